def report(o):
    return 0
