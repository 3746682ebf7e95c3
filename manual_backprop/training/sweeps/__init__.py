"""Sweeps: many runs from one command, their parent, and what comparing them shows.

    records.py    outputs/sweeps/<time>-<name>-<6 hex>/jobs/0003.json: what became of each job
    job.py        a job as a process of its own, so that its death ends nothing else
    sweep.py      the command's part: starts the jobs through Hydra, then concludes whatever has happened
    table.py      the table and the pictures of a sweep, from its records and its runs' metrics
    processors.py how many jobs run at once, and how many threads each may have

Hydra's sweeper chooses the values and its launcher says where and how many at a time; here each job gets its process,
its record and its place in MLflow. Importing this imports neither Hydra nor torch nor MLflow.
"""
