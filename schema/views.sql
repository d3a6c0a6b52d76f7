-- Views for people. They read the tables of tables.py; `query.py "select * from run_history"`.

-- One row per run, newest first.
CREATE VIEW run_history AS
SELECT
    runs.id AS run,
    models.name || CASE WHEN models.untrained THEN ' (untrained)' ELSE '' END AS model,
    (SELECT group_concat(value, ' ') FROM json_each(runs.repr_layers)) AS layers,
    (SELECT group_concat(value, ' ') FROM json_each(runs.include)) AS include,
    runs.input_path AS input,
    runs.status AS status,
    coalesce(done.records, 0) AS records_done,
    runs.records_total AS records_total,
    round(done.residues / nullif(done.seconds, 0), 1) AS residues_per_second,
    runs.started_at AS started,
    runs.finished_at AS finished,
    runs.output_folder AS output
FROM runs
LEFT JOIN models ON models.id = runs.model_id
LEFT JOIN (
    SELECT run_id, sum(records) AS records, sum(residues) AS residues, sum(seconds) AS seconds
    FROM checkpoints GROUP BY run_id
) AS done ON done.run_id = runs.id
ORDER BY runs.id DESC;

-- How far each run is, in residues computed, and when its process last said it was alive.
CREATE VIEW run_progress AS
SELECT
    runs.id AS run,
    runs.status AS status,
    coalesce(done.residues, 0) AS residues_done,
    runs.residues_total AS residues_total,
    round(100.0 * coalesce(done.residues, 0) / runs.residues_total, 1) AS percent,
    coalesce(done.checkpoints, 0) AS checkpoints,
    (SELECT count(*) FROM attempts WHERE attempts.run_id = runs.id) AS attempts,
    (SELECT max(heartbeat_at) FROM attempts WHERE attempts.run_id = runs.id) AS heartbeat
FROM runs
LEFT JOIN (
    SELECT run_id, sum(residues) AS residues, count(*) AS checkpoints
    FROM checkpoints GROUP BY run_id
) AS done ON done.run_id = runs.id
ORDER BY runs.id DESC;

-- Every checkpoint with its model and what, if anything, is wrong with its metadata.
CREATE VIEW checkpoint_audit AS
SELECT
    checkpoints.id AS checkpoint,
    checkpoints.run_id AS run,
    runs.output_folder || '/' || checkpoints.path AS file,
    checkpoints.esm2_config ->> 'name' AS model,
    checkpoints.esm2_config ->> 'sha256' AS model_sha256,
    checkpoints.records AS records,
    checkpoints.bytes AS bytes,
    checkpoints.committed_at AS committed,
    CASE
        WHEN checkpoints.esm2_config IS NULL THEN 'no model metadata (NULL)'
        WHEN runs.esm2_config IS NULL THEN 'run has no model metadata (NULL)'
        WHEN EXISTS (
            SELECT key FROM json_each(runs.esm2_config)
            EXCEPT SELECT key FROM json_each(checkpoints.esm2_config)
        ) THEN 'model metadata lacks ' || (
            SELECT group_concat(key, ', ') FROM (
                SELECT key FROM json_each(runs.esm2_config)
                EXCEPT SELECT key FROM json_each(checkpoints.esm2_config)
            )
        )
        WHEN EXISTS (
            SELECT key, value FROM json_each(checkpoints.esm2_config)
            EXCEPT SELECT key, value FROM json_each(runs.esm2_config)
        ) THEN 'model metadata differs from the run in ' || (
            SELECT group_concat(key, ', ') FROM (
                SELECT key, value FROM json_each(checkpoints.esm2_config)
                EXCEPT SELECT key, value FROM json_each(runs.esm2_config)
            )
        )
    END AS problem
FROM checkpoints
JOIN runs ON runs.id = checkpoints.run_id
ORDER BY checkpoints.id;

-- What each model was used for.
CREATE VIEW model_usage AS
SELECT
    models.id AS model_id,
    models.name || CASE WHEN models.untrained THEN ' (untrained)' ELSE '' END AS model,
    models.sha256 AS sha256,
    count(DISTINCT runs.id) AS runs,
    coalesce(sum(done.records), 0) AS records,
    coalesce(sum(done.residues), 0) AS residues,
    round(sum(done.residues) / nullif(sum(done.seconds), 0), 1) AS residues_per_second,
    max(runs.started_at) AS last_used
FROM models
LEFT JOIN runs ON runs.model_id = models.id
LEFT JOIN (
    SELECT run_id, sum(records) AS records, sum(residues) AS residues, sum(seconds) AS seconds
    FROM checkpoints GROUP BY run_id
) AS done ON done.run_id = runs.id
GROUP BY models.id
ORDER BY last_used DESC;
