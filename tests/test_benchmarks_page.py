"""``docs/benchmarks.md`` says what the recorded results say."""

from benchmarks import report


def test_the_page_is_what_the_results_say() -> None:
    assert report.main(["--check"]) == 0, "run `python -m benchmarks.report`"
