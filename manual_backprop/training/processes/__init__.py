"""Data-parallel training on several processes and machines.

`start` starts the processes of one machine, or runs in one started by torchrun. `group` connects them: sums, shared
values, and errors that name the failed process. `watch` notices processes that no longer respond. `reduction` sums each
block's gradients while the backward pass of the block below runs. Other rooms know only the interface in
`common.processes`; `optim.sharding` shards the moments of an optimizer.
Not here: what a process does with its part (`training.runner`).
May import: what training may.
"""
