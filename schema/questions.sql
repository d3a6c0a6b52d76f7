-- Questions that people ask of the run database, each with its one statement. docs/history.md
-- shows them in this order, and `make browse` has a page for each. `{run: 1}` is the field `run` of
-- that page, which shows all as long as it is empty; the docs have the value 1 there.

-- Which runs used this model on this input?
SELECT run, model, layers, released, status, started, label FROM run_history
WHERE model LIKE '%{model: esm2_t33_650M_UR50D}%' AND EXISTS (
    SELECT * FROM record_files
    WHERE record_files.run = run_history.run AND file LIKE '%{input: proteins.fasta}%'
);

-- What is unfinished, and how far is it?
SELECT run, status, percent, attempts, heartbeat FROM run_progress
WHERE status NOT IN ('finished', 'pruned');

-- How many tokens per second, by model and machine?
SELECT m.name AS model, coalesce(w.host, a.host) AS machine, coalesce(w.device_name, a.device_name) AS processor,
       round(sum(c.residues + 2 * (c.stop_position - c.first_position)) / sum(c.seconds)) AS tokens_per_second
FROM checkpoints c JOIN attempts a ON a.id = c.attempt_id LEFT JOIN workers w ON w.id = c.worker_id
JOIN runs r ON r.id = c.run_id JOIN models m ON m.id = r.model_id
WHERE c.reused_run_id IS NULL GROUP BY m.id, machine, processor;

-- Which checkpoints lack metadata, or differ from their run?
SELECT run, file, problem FROM checkpoint_audit WHERE problem IS NOT NULL;

-- Which model made this file?
SELECT run, model, model_sha256 FROM checkpoint_audit,
    (SELECT rtrim(file, replace(file, '/', '')) AS folder FROM pragma_database_list WHERE name = 'main')
WHERE file LIKE '%{file: run-000001/checkpoint-000001.parquet}'
    OR folder || substr(file, 3) LIKE '%{file: run-000001/checkpoint-000001.parquet}';

-- Which file is this record from?
SELECT run, file, {record: 100} - first_record AS record_in_file FROM record_files
WHERE run = {run: 1} AND {record: 100} BETWEEN first_record AND last_record;

-- What was copied from earlier runs, and from which?
SELECT run_id AS run, reused_run_id AS from_run, sum(records) AS records
FROM checkpoints WHERE reused_run_id IS NOT NULL GROUP BY run_id, reused_run_id;

-- Which inputs were embedded with more than one model?
SELECT input_path, count(DISTINCT model_id) AS models, group_concat(DISTINCT id) AS runs
FROM runs GROUP BY input_sha256 HAVING count(DISTINCT model_id) > 1;

-- Which models have the same name and different weights?
SELECT name, count(*) AS weights, group_concat(substr(sha256, 1, 8)) AS digests
FROM models GROUP BY name HAVING count(DISTINCT sha256) > 1;

-- Which runs were stopped, how often, and by what?
SELECT run_id, count(*) AS attempts, max(error) AS error,
       group_concat(coalesce(outcome, 'running or killed'), ' then ') AS outcomes
FROM attempts GROUP BY run_id HAVING count(*) > 1 OR max(coalesce(outcome, '')) <> 'finished';

-- How much disk does each run take?
SELECT run_id, count(*) AS files, sum(c.bytes) / 1e6 AS megabytes
FROM checkpoints c JOIN runs r ON r.id = c.run_id WHERE r.pruned_at IS NULL GROUP BY run_id;

-- Which runs cut sequences, read letters as X, or read genes or an alignment?
SELECT id AS run, records_truncated, residues_mapped, records_nucleotide_like, records_with_gaps FROM runs
WHERE records_truncated > 0 OR residues_mapped > 0 OR records_nucleotide_like > 0 OR records_with_gaps > 0;

-- Which library versions computed this run?
SELECT id AS attempt, versions ->> 'torch' AS torch, versions ->> 'python' AS python
FROM attempts WHERE run_id = {run: 1};

-- Which workers of a cluster computed this run, and how fast?
SELECT worker, host, device_name, checkpoints, residues_per_second, outcome, error
FROM worker_throughput WHERE run = {run: 1};
