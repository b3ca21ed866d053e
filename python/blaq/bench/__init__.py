"""Times every op of ``torch.ops.blaq`` against the best that torch offers for the same work.

``timing.py`` measures, ``case.py`` says what a case is, ``training.py`` and ``packed.py`` are the
tables of cases, ``targets.py`` holds the project's own aims, ``command.py`` is ``blaq bench``.
"""
