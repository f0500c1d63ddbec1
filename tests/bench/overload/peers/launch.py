"""Start a server whose model takes its time: ``launch.py BASE_S ROW_S SCRIPT …``.

Each run of the engine sleeps first: `BASE_S`, and `ROW_S` for each row. So a server's capacity is known, and hardly
any of the machine is used, which is left to the load generator. With both 0 nothing is changed. The script finds the
same process, `sys.argv` and path as if it had been started by itself. Stands alone: peers' venvs run it.
"""

import runpy
import sys
import time
from pathlib import Path
from typing import Any

SERVING_PEERS = Path(__file__).parent.parent.parent / "serving" / "peers"


def slow_hedgerow(base_s: float, row_s: float) -> None:
    """Hedgerow's engine: each run of a session."""
    from hedgerow.engines import onnxruntime

    class Slow:
        def __init__(self, session: Any) -> None:
            self._session = session
            self.inputs, self.outputs, self.close = session.inputs, session.outputs, session.close

        def run(self, inputs: Any, outputs: Any) -> Any:
            time.sleep(base_s + row_s * max(len(array) for array in inputs.values()))
            return self._session.run(inputs, outputs)

    open_model = onnxruntime.open_model
    vars(onnxruntime)["open_model"] = lambda *arguments, **options: Slow(open_model(*arguments, **options))


def slow_peer(base_s: float, row_s: float) -> None:
    """The engine that peers share: each call of its model."""
    import engine  # type: ignore[import-not-found, unused-ignore]

    class Slow(engine.Model):  # type: ignore[misc, unused-ignore]
        def __call__(self, array: Any) -> Any:
            time.sleep(base_s + row_s * len(array))
            return super().__call__(array)

    vars(engine)["Model"] = Slow


if __name__ == "__main__":
    base, row, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    if float(base) or float(row):
        ours = Path(script).parent != SERVING_PEERS or Path(script).name == "bare_server.py"
        (slow_hedgerow if ours else slow_peer)(float(base), float(row))
    runpy.run_path(script, run_name="__main__")
