"""Jobs: `status` holds the state machine's tables, `job` runs one."""
