"""Time series: read from a CSV file, and cut into the windows that a network reads.

    reader.py     reads a table of numbers over time, and reports what is wrong with a file
    windows.py    windows of history and horizon, gaps, and scaling between values and network inputs
    co2.csv       weekly CO2 at Mauna Loa, public domain, with its source

Not here: the metrics of forecasts (`tasks.forecasting`).
"""
