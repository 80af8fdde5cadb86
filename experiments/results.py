"""Write the tables of RESULTS.md from recorded rows: python experiments/results.py [--check].

A table stands between `<!-- panda table ... -->` and `<!-- end -->`: it is what this command says of the rows in its
--folder, without running anything. After `<!-- gains ... -->` it is that of gains.py. --check changes nothing, and ends
with status 1 where RESULTS.md says otherwise.
"""

import re
import shlex
import sys
from pathlib import Path

import gains

from panda_lightning.command.parser import OneSentenceParser
from panda_lightning.tables import formats
from panda_lightning.tables.rows import Rows
from panda_lightning.tools import table

PAGE = Path(__file__).with_name("RESULTS.md")
BLOCK = re.compile(r"<!-- (panda table|gains)\b(.*?\s)-->\n.*?<!-- end -->", re.DOTALL)
DETAILS = re.compile(r"(?<=\n\n)\| normal class \|.*?(?=\n\n(?:Failed|Not run:|Made by))", re.DOTALL)
FOLDED = "<details markdown>\n<summary>By class, by pair, by kind of anomaly</summary>\n\n{}\n\n</details>"


def block(found: re.Match[str]) -> str:
    """A block as the rows say."""
    kind, words = found.groups()
    text = gains.table(words) if kind == "gains" else of_study((kind + words).strip())
    return f"<!-- {kind}{words}-->\n\n{text}\n\n<!-- end -->"


def of_study(command: str) -> str:
    """What a command says."""
    parser = OneSentenceParser()
    table.arguments(parser)
    config = parser.parse_args(shlex.split(command)[2:])
    plan = table.plan_of(config)
    rows = Rows(config.folder or Path("none"))
    places = {row.place for row in plan}
    found = [one for one in rows.read() if one.row.place in places]
    summary = table.summarised(rows, found, plan, config)
    for one in summary["sets"] if config.classes else ():
        one["others"] = []  # methods that were only published, for all classes
    text = formats.markdown(summary, how="")
    body = text.partition("\n\n")[2]  # without its heading
    body = body.replace("are in table.html", "are in the table.html that this command writes")
    body = DETAILS.sub(lambda found: FOLDED.format(found[0]), body)
    return f"`{command}`\n\n{body}"


if __name__ == "__main__":
    before = PAGE.read_text("utf-8")
    after = BLOCK.sub(block, before)
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(after, "utf-8")
    elif after != before:
        sys.exit("RESULTS.md is not what the rows say: run python experiments/results.py, and look at what changed.")
