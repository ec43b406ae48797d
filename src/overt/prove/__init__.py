"""Which design tells whom: a model of error cursors and overlays, the designs, the use cases, and a checker.

    world     the pieces: superblocks, inodes, open files; and what the claims remember of each
    designs/  what each design does at mount, open, fsync, syncfs, umount; a file for each, with its source
    verbs     what can happen, one thing at a time
    claims    the use cases U1 to U25, as properties of histories
    checker   every history within a scope, breadth first
    matrix    designs x use cases: the verdicts, and a shortest history for each that is violated
    races     errseq between two instructions
    census    one error under N containers, N up to 1000
    timeline  a history for people to read: text, and picture for SVG

No I/O in here. `overt prove` is the command, docs/use-cases.md what it found.
"""
