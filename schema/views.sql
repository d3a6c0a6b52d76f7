-- Views for people, of the tables in tables.py. To read one: `query.py "select * from run_history"`.
-- The line above a view describes its rows, the line above a column its content.

-- One row per run, newest first.
CREATE VIEW run_history AS
SELECT
    -- number of the run
    runs.id AS run,
    -- name of the model; (not the released file) if its name is like a released one's, but its digest is not; (untrained) if scripts/make_model.py made it
    models.name
        || CASE WHEN NOT models.released AND models.name GLOB 'esm2_t*_UR50D'
            THEN ' (not the released file)' ELSE '' END
        || CASE WHEN models.untrained THEN ' (untrained)' ELSE '' END AS model,
    -- 1 if the digest of its weights is that of a published ESM-2 model; NULL if that is not known
    models.released AS released,
    -- name and SHA-256 of the model that a LoRA adapter changes; NULL for other models
    models.base_name || ' (sha256 ' || models.base_sha256 || ')' AS base,
    -- what its user called it; NULL if nothing
    runs.label AS label,
    -- layers kept
    (SELECT group_concat(value, ' ') FROM json_each(runs.repr_layers)) AS layers,
    -- what is kept: mean, bos, per_tok, contacts
    (SELECT group_concat(value, ' ') FROM json_each(runs.include)) AS include,
    -- type of the matrix products: float32, bfloat16 or float16
    runs.precision AS precision,
    -- the FASTA file, ./ is the folder of the database; of several the first, and how many more
    runs.input_path || coalesce(
        (SELECT ' and ' || (count(*) - 1) || ' more' FROM inputs
        WHERE inputs.run_id = runs.id HAVING count(*) > 1), ''
    ) AS input,
    -- running, interrupted, failed or finished; pruned, however it ended, if its files were taken off the disk
    CASE WHEN runs.pruned_at IS NULL THEN runs.status ELSE 'pruned' END AS status,
    -- records in its checkpoints
    coalesce(done.records, 0) AS records_done,
    -- records in the input
    runs.records_total AS records_total,
    -- records of its checkpoints that were copied from earlier runs
    coalesce(done.reused, 0) AS reused,
    -- residues computed per second; workers of a cluster compute at the same time
    round(done.residues / nullif(done.seconds, 0), 1) AS residues_per_second,
    -- workers of clusters that computed for it; 0 if the processes of its attempts did
    coalesce(done.workers, 0) AS workers,
    -- UTC ISO 8601
    runs.started_at AS started,
    -- UTC ISO 8601; NULL if unfinished
    runs.finished_at AS finished,
    -- when its files were taken off the disk, UTC ISO 8601; NULL if they were not
    runs.pruned_at AS pruned,
    -- the folder of its checkpoints; ./ is the folder of the database
    runs.output_folder AS output
FROM runs
LEFT JOIN models ON models.id = runs.model_id
LEFT JOIN (
    SELECT
        run_id,
        sum(records) AS records,
        sum(reused) AS reused,
        sum(residues) AS residues,
        sum(seconds) AS seconds,
        sum(workers) AS workers
    FROM (
        SELECT
            run_id,
            sum(records) AS records,
            sum(records) FILTER (WHERE reused_run_id IS NOT NULL) AS reused,
            sum(residues) AS residues,
            count(DISTINCT worker_id) AS workers,
            CASE
                WHEN count(worker_id) = 0 THEN sum(seconds) FILTER (WHERE reused_run_id IS NULL)
                ELSE 86400.0 * (
                    max(julianday(committed_at)) FILTER (WHERE reused_run_id IS NULL)
                    - min(julianday(committed_at) - seconds / 86400.0)
                        FILTER (WHERE reused_run_id IS NULL)
                )
            END AS seconds
        FROM checkpoints GROUP BY run_id, attempt_id
    ) GROUP BY run_id
) AS done ON done.run_id = runs.id
ORDER BY runs.id DESC;

-- The progress of each run, in residues of different sequences, and the last sign of life of its process.
CREATE VIEW run_progress AS
SELECT
    -- number of the run
    runs.id AS run,
    -- running, interrupted, failed or finished; pruned, however it ended, if its files were taken off the disk
    CASE WHEN runs.pruned_at IS NULL THEN runs.status ELSE 'pruned' END AS status,
    -- residues computed or copied, and committed
    coalesce(done.residues, 0) AS residues_done,
    -- residues of the different sequences in the input
    runs.residues_total AS residues_total,
    -- residues_done as a percentage of residues_total
    round(100.0 * coalesce(done.residues, 0) / runs.residues_total, 1) AS percent,
    -- checkpoints on record
    coalesce(done.checkpoints, 0) AS checkpoints,
    -- processes that worked on it
    (SELECT count(*) FROM attempts WHERE attempts.run_id = runs.id) AS attempts,
    -- last sign of life of any of them, UTC ISO 8601
    (SELECT max(heartbeat_at) FROM attempts WHERE attempts.run_id = runs.id) AS heartbeat
FROM runs
LEFT JOIN (
    SELECT
        run_id,
        sum(residues + coalesce(residues_reused, 0)) AS residues,
        count(*) AS checkpoints
    FROM checkpoints GROUP BY run_id
) AS done ON done.run_id = runs.id
ORDER BY runs.id DESC;

-- The input files of each run, and which of its records are from each.
CREATE VIEW record_files AS
SELECT
    -- number of the run
    run_id AS run,
    -- place of the file in the input, 0-based
    number AS number,
    -- the FASTA file, ./ is the folder of the database; of standard input, the copy kept
    path AS file,
    -- number of its first record
    first_record AS first_record,
    -- number of its last record
    first_record + records - 1 AS last_record,
    -- records in the file
    records AS records,
    -- size of the file
    bytes AS bytes,
    -- SHA-256 of the file
    sha256 AS sha256
FROM inputs
ORDER BY run_id, number;

-- Every checkpoint with its model, and the problem with its metadata if there is one.
CREATE VIEW checkpoint_audit AS
SELECT
    -- number of the checkpoint
    checkpoints.id AS checkpoint,
    -- its run
    checkpoints.run_id AS run,
    -- its Parquet file; ./ is the folder of the database
    runs.output_folder || '/' || checkpoints.path AS file,
    -- name of the model, from its own metadata; (not the released file) as in run_history
    checkpoints.esm2_config ->> 'name'
        || CASE WHEN NOT checkpoints.esm2_config ->> 'released'
            AND checkpoints.esm2_config ->> 'name' GLOB 'esm2_t*_UR50D'
            THEN ' (not the released file)' ELSE '' END AS model,
    -- SHA-256 of the weights, from its own metadata
    checkpoints.esm2_config ->> 'sha256' AS model_sha256,
    -- rows in the file
    checkpoints.records AS records,
    -- number of the run that the rows were copied from; NULL if they were computed
    checkpoints.reused_run_id AS reused_run,
    -- size of the file
    checkpoints.bytes AS bytes,
    -- UTC ISO 8601
    checkpoints.committed_at AS committed,
    -- problem with its metadata; NULL if there is none
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
        WHEN checkpoints.reused_run_id = checkpoints.run_id THEN 'copied from its own run'
        WHEN sources.esm2_config ->> 'sha256' <> runs.esm2_config ->> 'sha256'
            OR sources.precision <> runs.precision
            THEN 'copied from a run of another model or precision'
    END AS problem
FROM checkpoints
JOIN runs ON runs.id = checkpoints.run_id
LEFT JOIN runs AS sources ON sources.id = checkpoints.reused_run_id
ORDER BY checkpoints.id;

-- The runs, records and speed of each model.
CREATE VIEW model_usage AS
SELECT
    -- number of the model
    models.id AS model_id,
    -- name of the model; (not the released file) if its name is like a released one's, but its digest is not; (untrained) if scripts/make_model.py made it
    models.name
        || CASE WHEN NOT models.released AND models.name GLOB 'esm2_t*_UR50D'
            THEN ' (not the released file)' ELSE '' END
        || CASE WHEN models.untrained THEN ' (untrained)' ELSE '' END AS model,
    -- 1 if the digest of its weights is that of a published ESM-2 model; NULL if that is not known
    models.released AS released,
    -- SHA-256 of the weights on disk
    models.sha256 AS sha256,
    -- runs that used it
    count(DISTINCT runs.id) AS runs,
    -- records that it embedded; not those that were copied
    coalesce(sum(done.records - coalesce(done.reused, 0)), 0) AS records,
    -- residues that it computed
    coalesce(sum(done.residues), 0) AS residues,
    -- residues computed per second of its checkpoints
    round(sum(done.residues) / nullif(sum(done.seconds), 0), 1) AS residues_per_second,
    -- start of its newest run, UTC ISO 8601
    max(runs.started_at) AS last_used
FROM models
LEFT JOIN runs ON runs.model_id = models.id
LEFT JOIN (
    SELECT
        run_id,
        sum(records) AS records,
        sum(records) FILTER (WHERE reused_run_id IS NOT NULL) AS reused,
        sum(residues) AS residues,
        sum(seconds) FILTER (WHERE reused_run_id IS NULL) AS seconds
    FROM checkpoints GROUP BY run_id
) AS done ON done.run_id = runs.id
GROUP BY models.id
ORDER BY last_used DESC;

-- What each worker of a cluster computed, and how it ended.
CREATE VIEW worker_throughput AS
SELECT
    -- number of the run
    attempts.run_id AS run,
    -- number of the attempt that it worked for
    workers.attempt_id AS attempt,
    -- number of the worker
    workers.id AS worker,
    -- name of the machine
    workers.host AS host,
    -- process number on that machine
    workers.pid AS pid,
    -- cpu or cuda:N; NULL if it was refused before that was known
    workers.device AS device,
    -- what the processor calls itself
    workers.device_name AS device_name,
    -- checkpoints that it computed
    coalesce(done.checkpoints, 0) AS checkpoints,
    -- records in them
    coalesce(done.records, 0) AS records,
    -- residues computed for them
    coalesce(done.residues, 0) AS residues,
    -- residues computed per second of its checkpoints
    round(done.residues / nullif(done.seconds, 0), 1) AS residues_per_second,
    -- finished, refused or lost; NULL while it lives
    workers.outcome AS outcome,
    -- why it was refused or lost
    workers.error AS error
FROM workers
JOIN attempts ON attempts.id = workers.attempt_id
LEFT JOIN (
    SELECT worker_id, count(*) AS checkpoints, sum(records) AS records, sum(residues) AS residues,
        sum(seconds) AS seconds
    FROM checkpoints GROUP BY worker_id
) AS done ON done.worker_id = workers.id
ORDER BY workers.id;
