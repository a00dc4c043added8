"""The pages over all answers: analysis/results/README.md, and a study's own page.

Read the modules in this order: answers, page. They judge no runs.
"""
