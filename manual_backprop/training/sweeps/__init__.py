"""Sweeps: many runs from one command, their parent run, and their comparison.

    records.py    outputs/sweeps/<time>-<name>-<6 hex>/jobs/0003.json: the outcome of each job
    job.py        a job in its own process, so that its death does not end the sweep
    sweep.py      starts the jobs through Hydra, then writes the table and pictures, whatever happened
    table.py      the table of a sweep, from its records
    pictures.py   the pictures of a sweep, from its records and the metrics of its runs
    processors.py how many jobs run at once, and how many threads each may have

Hydra's sweeper chooses the values; its launcher decides where and how many jobs run at a time. Here each job gets its
process, its record and its parent run in MLflow. Importing this imports neither Hydra nor torch nor MLflow.
"""
