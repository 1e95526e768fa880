"""The gate's verdict as JUnit XML, Markdown and JSON: what CI systems and reviewers see."""

import json
from xml.etree import ElementTree

from edgeport.report.verdict import junit, markdown, verdict_document
from edgeport.validate.evidence import Check, Verdict


def check(metric="cosine_min", **changes):
    fields = {
        "metric": metric,
        "measured": 0.97,
        "allowed": 0.98,
        "passed": False,
        "exit_code": 10,
        "message": "cosine_min of logits is 0.97; at least 0.98 is allowed",
        "advice": "Keep a layer in float.",
    }
    return Check(**{**fields, **changes})


VERDICT = Verdict(
    passed=False,
    exit_code=10,
    checks=(
        check(output="logits"),
        check("size_max", measured=20.0, allowed=25.0, unit="MB", passed=True, exit_code=13, message="fine"),
        check("latency_p90_max", measured=None, allowed=20.0, unit="ms", exit_code=15, message="not measured: a < b"),
        check("accuracy_drop_max", output="x|y\x00", low=-0.01, high=0.04, undecided=True, needed=900, exit_code=15),
    ),
    notes=("latency: the older bundle has no valid run",),
)


def test_junit_has_a_case_a_check_and_tells_failures_from_errors():
    root = ElementTree.fromstring(junit("out/a", VERDICT))
    suite = root.find("testsuite")
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4",
        "failures": "1",
        "errors": "2",
        "skipped": "0",
    }
    cases = suite.findall("testcase")
    assert [case.get("classname") for case in cases] == [
        "edgeport.parity",
        "edgeport.size",
        "edgeport.validity",
        "edgeport.validity",
    ]
    assert [case.get("name") for case in cases] == [
        "cosine_min [logits]",
        "size_max",
        "latency_p90_max",
        "accuracy_drop_max [x|y\ufffd]",
    ]
    assert [child.tag for case in cases for child in case] == ["failure", "system-out", "error", "error"]
    failure = cases[0].find("failure")
    assert failure.get("message") == VERDICT.checks[0].message
    for line in ("measured: 0.97", "allowed: 0.98", "exit code: 10", "first thing to try: Keep a layer in float."):
        assert line in failure.text
    assert cases[2].find("error").get("message") == "not measured: a < b"


def test_markdown_names_the_failures_first_and_every_check():
    text = markdown("out/a", VERDICT, against="out/old")
    lines = text.splitlines()
    assert lines[0] == "## edgeport gate: failed (exit code 10)"
    assert "`out/a` against `out/old`" in lines
    assert "1 of 4 checks passed." in lines
    assert sum(line.startswith("- **") for line in lines) == 3
    assert "Keep a layer in float." in text
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 1 + len(VERDICT.checks)
    assert "| size_max | 20 MB |  | 25 MB | passed |" in rows
    assert "| latency_p90_max | — |  | 20 ms | not measured |" in rows
    assert any("x\\|y" in row and "-0.01 to 0.04" in row and "undecided" in row for row in rows)
    assert lines[-1] == "- not compared: latency: the older bundle has no valid run"


def test_markdown_of_a_pass_is_short():
    passed = Verdict(passed=True, exit_code=0, checks=(check(passed=True),))
    assert markdown("b", passed).startswith("## edgeport gate: passed\n\n`b`\n\n1 of 1 checks passed.\n")


def test_the_document_has_the_outcome_in_words():
    document = json.loads(json.dumps(verdict_document("b", VERDICT)))
    assert [row["outcome"] for row in document["checks"]] == ["failed", "passed", "not measured", "undecided"]
    assert (document["exit_code"], document["passed"], document["against"]) == (10, False, None)
    assert document["checks"][3]["needed"] == 900
