-- A study. One row per trial; a trial's number and params never change once written.
-- PostgreSQL gets the same tables with BIGINT and DOUBLE PRECISION.
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;

CREATE TABLE trial (
    number        INTEGER PRIMARY KEY,
    state         TEXT NOT NULL CHECK (state IN ('running', 'complete', 'failed', 'stopped')),
    params        TEXT NOT NULL,             -- JSON object, in the space's order
    seed          INTEGER NOT NULL,
    why           TEXT NOT NULL,             -- JSON object
    seen          INTEGER NOT NULL,          -- the suggestion is based on trials with finish_order <= seen
    rung          INTEGER NOT NULL,          -- 0 for a suggestion, above it for a promotion
    parent        INTEGER,                   -- the trial of the rung below that was promoted
    value         REAL,
    error         TEXT,
    seconds       REAL NOT NULL DEFAULT 0,   -- over all attempts that reported back
    attempts      INTEGER NOT NULL DEFAULT 0,-- workers that died on it
    owner         TEXT,
    token         INTEGER NOT NULL,          -- fencing: grows with every lease of this trial
    claim         TEXT,                      -- names the last handing out, so that a repeated one is recognised
    lease_expires REAL,                      -- seconds since 1970
    started_at    REAL NOT NULL,
    finished_at   REAL,
    finish_order  INTEGER UNIQUE             -- 1, 2, 3, … in the order of the results
) STRICT;

-- Results that came when their lease had gone to another worker.
CREATE TABLE late_result (
    trial INTEGER NOT NULL REFERENCES trial (number),
    token INTEGER NOT NULL,
    value REAL,
    error TEXT,
    at    REAL NOT NULL,
    PRIMARY KEY (trial, token)
) STRICT;

-- Measured parts of S(x), by the settings they depend on.
CREATE TABLE discrepancy (
    part     TEXT NOT NULL,
    settings TEXT NOT NULL,
    value    REAL NOT NULL,
    PRIMARY KEY (part, settings)
) STRICT;
