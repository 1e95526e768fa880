"""Suites: what a model is for, asked of the original and of the shipped file on the same samples.

`*.toml` beside this file are the suites that come with edgeport. `definition.py` reads one, `readers.py` its rows,
`rows.py` keeps apart what is tuned on and what is measured on, `subject.py` asks a model, `kinds/` turns answers into
scores, and `evaluate.py` makes the evidence of them.
"""
