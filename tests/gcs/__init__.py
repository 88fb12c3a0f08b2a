"""A server of Google Cloud Storage's JSON API, in memory, for the tests of workdirs in buckets."""
