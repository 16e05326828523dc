"""The mirror: `plan` decides, `copier` does, `zero_map`, `throttle` and `progress` keep account, `job` is the loop."""
