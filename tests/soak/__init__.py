"""Random runs with random faults, for as long as one likes: is anything lost or left?

``python -m tests.soak MINUTES``, or ``nox -s soak -- MINUTES``. Pytest collects none of
it, but ``test_soak.py`` runs it for a while.

::

    plans.py      a seed and a number -> what an agent does, and what its caller
    agent.py      the agent that does it, in a container
    fake.py       the same as a task
    callers.py    does a caller's part, and checks what has come of it
    hosts.py      bots: with a dispatcher, and killed without warning
    measures.py   what there is of this process and its containers, before and after
    __main__.py   rounds of plans, each with new engines; the table
"""
