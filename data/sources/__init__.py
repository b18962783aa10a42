"""Where rows come from: files of JSON, Parquet, Arrow, CSV, saved `datasets`, the hub; all as `Rows`."""
