"""The report: one self-contained HTML page of a run, or of several side by side.

collect.py      while the model is loaded: tokens with their NLL, answers of the tuned models
load.py         run directory -> Run
findings.py     what came out, in words and numbers
plots.py        figures as SVG (matplotlib, the `report` extra)
page.py         the page: escaping, content-security policy, sections
page.html page.css page.js     its skeleton, looks and behaviour
"""
