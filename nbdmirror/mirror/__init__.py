"""The mirror: `job` is its life, `transfer` the copying loop, `active` the guest's writes that go to both disks at once.

`plan`, `carry` and `trouble` decide, `copier` does; `convergence`, `ending` and `pace` say when and how long the guest is held;
`record` and `flusher` tie a bitmap to what is durable; `zero_map`, `throttle`, `progress` and `rates` keep account.
"""
