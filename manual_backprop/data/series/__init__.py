"""Series of numbers over time: read from a CSV file, and cut into the windows that a network reads.

    reader.py     a table of numbers over time, and what is said of a file that is none
    windows.py    history and horizon, gaps, scales: between values and a network's numbers
    co2.csv       weekly CO2 of Mauna Loa, public domain, with its source

Not here: what is measured of forecasts (`tasks.forecasting`).
"""
