"""The Hyper-V stage: a prepared bundle becomes a running machine on a Hyper-V host.

Constant scripts run there, data travels beside them as JSON, and what comes back is judged here.
"""
