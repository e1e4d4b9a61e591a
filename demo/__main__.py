"""`python -m demo`: see `--help`, or run it through `python run.py demo`, which installs what it needs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from trt_core.errors import InvalidOption, TRTError

from .options import Options, parse


def main() -> int:
    """0 after a whole demonstration, 2 for a mistake of the user's, 130 after Ctrl-C."""
    try:
        options = parse()
        for folder in (options.out, options.json.parent if options.json else options.out):
            _writable(folder)
        _show(options)
    except TRTError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    return 0


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidOption(f"The folder {folder} cannot be made: {error.strerror}.", fix="Choose another.") from error
    if not os.access(folder, os.W_OK):
        raise InvalidOption(f"The folder {folder} is read-only.", fix="Choose another with --out and --json.")


def _show(options: Options) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Only now, as these take seconds to import and a wrong option should be said at once.
    from .flow import Result, run
    from .phases import picture
    from .sheet import contact_sheet
    from .table import as_json, text

    result: Result
    result, pipe = run(options)
    print("\n" + text(result) + "\n")
    rows = [
        ("eager", [picture(pipe, row.eager.latents, row.phase.size) for row in result.rows]),
        ("compiled", [picture(pipe, row.compiled.latents, row.phase.size) for row in result.rows]),
    ]
    captions = [(row.phase.title, f"{row.phase.size}, {row.compiled.step_ms:.1f} ms/step") for row in result.rows]
    print(f"Pictures: {contact_sheet(captions, rows, options.out / 'contact-sheet.png')}")
    if options.json:
        options.json.write_text(json.dumps(as_json(result, options), indent=2) + "\n", encoding="utf-8")
        print(f"Numbers: {options.json}")


if __name__ == "__main__":
    sys.exit(main())
