"""Every shape of data at rest: database, config.ini, ESM2Config snapshot, Parquet columns."""
