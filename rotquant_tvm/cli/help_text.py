"""Help texts: what a command is for, and examples of it at the end; and the way from a model to a tuned library."""

from __future__ import annotations

OVERVIEW = """from a model to a tuned library:
  tvmc env                                                        what this machine offers, and what is missing
  tvmc formats                                                    the KV formats and their true sizes
  tvmc inspect model.gguf                                         what of a model can be packed
  tvmc compile model.gguf --kv-cache rq3 -o model.rq              an artifact: library, weights, tokenizer
  tvmc run model.rq --prompt "Once upon a time"                   text from it, here or wherever it is copied
  tvmc eval model.gguf --text book.txt --kv-cache rq3             how good the packed cache is
  tvmc tune model.gguf --kv-cache rq3 --target llvm               the fastest kernels for this machine, kept as a log
  tvmc compile model.gguf --kv-cache rq3 -o model.rq              once more: the log is found by itself
  tvmc bench decode --kv-cache rq3 --target llvm                  how fast that is

MODEL is a Hugging Face directory, a .gguf file, an .onnx file or an exported program (.pt2). For a GPU add --target
cuda, or name one that is not here: --target nvidia/nvidia-h100. tvmc COMMAND --help explains each command."""

_MARK = "For example:\n"


def help_parts(text: str) -> tuple[str, str]:
    """Split a command's text into its description and its examples, which end the help.

    The examples are the indented lines behind "For example:"; what follows them belongs to the description.
    """
    before, _, after = text.partition(_MARK)
    examples, _, rest = after.partition("\n\n")
    description = "\n\n".join(part.strip() for part in (before, rest) if part.strip())
    return description, f"examples:\n{examples.rstrip()}"


def example_commands(text: str) -> list[str]:
    """The commands in a command's examples, or in the overview, without what is said of them."""
    commands = []
    for line in text.splitlines():
        if line.startswith("  tvmc "):
            command = line.strip().partition("   ")[0]
            commands.append(command.partition(" > ")[0].strip())
    return commands
