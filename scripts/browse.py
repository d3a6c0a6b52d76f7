"""Show the run database in a web browser, with a page per question and every column explained.

    python scripts/browse.py
    python scripts/browse.py --port 8002

It is read-only and answers only this machine (127.0.0.1). Ctrl-C ends it. It needs the extra
`browse`, which `make browse` installs. Exit status: 0 ended by Ctrl-C, 2 no such database, 4 the
port is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

from lib.console.arguments import arguments, database_url
from lib.console.output import print_result
from lib.console.program import run_script
from lib.pages.browser import START_PAGE, browser_app
from lib.pages.loopback import ADDRESS, listen, serve


def main(argv: Sequence[str] | None = None) -> int:
    """Print the address of the pages and serve them until Ctrl-C."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--port", type=int, default=8001, metavar="N", help="default: 8001; 0: any free port"
    )
    parsed = parser.parse_args(argv)
    with listen(parsed.port) as listener:
        app = browser_app(database_url(parsed))
        url = f"http://{ADDRESS}:{listener.getsockname()[1]}{START_PAGE}"
        print_result({"url": url}, [f"{url} (Ctrl-C ends)"], as_json=parsed.json)
        with suppress(KeyboardInterrupt):
            serve(app, listener)
    return 0


if __name__ == "__main__":
    run_script(main)
