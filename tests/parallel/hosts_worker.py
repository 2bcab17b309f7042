"""A process of several that does nothing but meet the others: python hosts_worker.py FOLDER SECONDS --coordinator=… …

It leaves FOLDER/<process id>.json, what the processes agreed on, and waits to be killed.
"""

import json
import pathlib
import sys
import time

from deepseek_jax import cli
from deepseek_jax.parallel import hosts


def main(argv):
    given, (folder, seconds) = hosts.split_flags(argv)
    hosts.CONNECT_SECONDS = int(seconds)
    folder = pathlib.Path(folder)
    hosts.join(given, lambda: "Step 7 is safe.")
    me = given.process_id
    print(f"process {me} speaks")
    hosts.write_text(folder / "written.txt", f"by {me}")
    agreed = [hosts.from_primary(f"from {me}, é" + me * "longer"), hosts.all_true(True), hosts.all_true(me == 0)]
    sys.stdout.flush()
    (folder / f"{me}.partial").write_text(json.dumps(agreed))
    (folder / f"{me}.partial").rename(folder / f"{me}.json")
    time.sleep(600)


cli.run(main)
