"""faults.py, briefly: no run is lost, nothing ends in a traceback."""

import faults


def test_faults_are_survived():
    counts = faults.main(minutes=0.4, seed=3)
    assert counts["kills"] and counts["equal"] and counts["fuzzed"] == 1000, counts
    assert not counts["lost"] and not counts["tracebacks"], counts
