"""Tables and figures of the benchmark."""

from unimatrix.reports.bench_plots import plot_bytes, plot_speed, write_bench_plots
from unimatrix.reports.tables import render_document

SKIPPED = {
    "mode": "train", "model": "rwkv", "num_tokens": 2048, "batch_size": 1,
    "skipped": "one run took longer than 5 s",
}  # fmt: skip


def make_row(**fields) -> dict:
    return {
        "mode": "train",
        "model": "unimatrix",
        "num_tokens": 128,
        "batch_size": 16,
        "skipped": None,
        "parameters": 1000,
        "rounds": 20,
        "median_ms": 25.04,
        "fastest_ms": 24.0,
        "slowest_ms": 1234.5,
        "tokens_per_s": 81_790.2,
        "ratio_to_llama": 0.8125,
        "ratio_to_shortest": None,
        "multiply_adds": 10**9,
        "floor_ms": 12.5,
        "peak_share": 0.4992,
        "peak_bytes": 3 * 2**20,
        "state_bytes": 16_000,
    } | fields


def make_records() -> dict:
    decode = make_row(mode="decode", batch_size=1, num_tokens=1024, ratio_to_shortest=1.5)
    alone = make_row(mode="decode", num_tokens=65_536, ratio_to_llama=None)
    peer = make_row(model="mamba2", mode="decode")
    return {"bench/all": {"results": {"rows": [make_row(), SKIPPED, decode]}},
            "bench/more": {"results": {"rows": [alone, peer]}}}  # fmt: skip


def render(name: str) -> list[str]:
    text = f"<!-- table: {name} -->\n<!-- end -->"
    return render_document(text, make_records()).splitlines()[1:-1]


def test_a_mode_is_a_table_without_empty_columns() -> None:
    assert render("bench-train") == [
        "| run | model | tokens x batch | ms | range | rounds | tokens/s | ratio to Llama | "
        "floor ms | share of peak | peak bytes | state bytes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| all | unimatrix | 128 x 16 | 25 | 24-1,234 | 20 | 81,790 | 0.812 | 12.5 | 50 % | "
        "3 MiB | 15.6 KiB |",
        "| all | rwkv | 2,048 | skipped: one run took longer than 5 s |  |  |  |  |  |  |  |  |",
    ]
    header, _, row, *_ = render("bench-decode")
    assert "ratio to the first length" in header
    assert "| 1.5 |" in row


def test_the_summary_holds_ours_where_a_llama_was_timed() -> None:
    assert render("speed-summary")[2:] == [
        "| train step | all | unimatrix | 128 x 16 | 25 | 0.812 | 15.6 KiB |",
        "| decoding a token | all | unimatrix | 1,024 | 25 | 0.812 | 15.6 KiB |",
    ]


def test_figures_hold_every_model_and_mode(tmp_path) -> None:
    rows = [
        make_row(mode=mode, model=model, num_tokens=num_tokens)
        for mode in ("train", "prefill", "decode", "step")
        for model in ("unimatrix", "llama", "rosa")
        for num_tokens in (64, 100, 1024)
    ]
    speed, size = plot_speed(rows), plot_bytes(rows)
    assert [axes.get_title(loc="left") for axes in speed.axes] == [
        "Train step", "Reading a prompt", "Decoding through generate", "One token through forward",
    ]  # fmt: skip
    assert [axes.get_title(loc="left") for axes in size.axes] == [
        "State or cache of one sequence",
        "Peak of a process: train step",
        "Peak of a process: reading a prompt",
    ]
    for figure in (speed, size):
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert labels == ["unimatrix", "Llama (SDPA)", "rosa"]
    assert [label.get_text() for label in speed.axes[0].get_xticklabels()] == ["64", "1k"]
    write_bench_plots([SKIPPED], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_compiled_model_is_drawn_as_itself_with_hollow_marks() -> None:
    names = ("llama", "llama, compiled")
    figure = plot_speed([make_row(model=name, num_tokens=64) for name in names])
    eager, compiled = figure.axes[0].get_lines()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["Llama (SDPA)", "Llama (SDPA), compiled"]
    assert eager.get_color() == compiled.get_color() == eager.get_markerfacecolor()
    assert eager.get_linestyle() == compiled.get_linestyle() == "--"
    assert compiled.get_markerfacecolor() == "white"


def test_a_bytes_floor_has_a_column_where_there_is_one() -> None:
    row = make_row(bandwidth_share=0.25)
    table = render_document(
        "<!-- table: bench-train -->\n<!-- end -->", {"bench/gpu": {"results": {"rows": [row]}}}
    )
    assert "| share of bandwidth |" in table
    assert "| 25 % |" in table
