"""One training on several processes and machines: data parallel.

`start` makes the processes of one machine, or finds itself started by torchrun; `group` connects them: sums, values
for all, and the errors that name who has failed; `watch` sees who no longer answers; `reduction` adds up each block's
gradients while the block below is calculated. The seam that others know is `common.processes`; the moments of an
optimizer are shared out in `optim.sharding`.
Not here: what a process does with its part (`training.runner`).
May import: what training may.
"""
