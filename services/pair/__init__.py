"""A verify worker and a draft worker in one process, for machines on which both would share the cores.

Each is a worker of its own to everybody else: its own service, record in the store, sequences and costs. What they
share is the thread that computes, and features reach the drafter without a wire (`near.py`).
"""
