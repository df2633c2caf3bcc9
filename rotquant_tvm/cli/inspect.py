"""x"""

SUMMARY = "x"


def add_arguments(p):
    pass


def execute(a, o):
    pass
