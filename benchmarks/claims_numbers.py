"""Where the numbers of `claims.py` are, claim by claim, and whether they are as good as what is claimed."""

from __future__ import annotations

from bench_runs import command
from claims_results import Found, MissingError, Results, Row, longest_tokens, reached, verdict_of_longest

MIB = 2**20
OTHER_MACHINE = "other machine, not comparable"
AS_GOOD = 0.95
"""Of a proportion, for it to count as one."""


# --- MST ---


SMALL_CARD, SMALL_CARD_GIB = "80gb-mini", 79.1


def _on_small_card(results: Results) -> Row:
    """Our longest sequence on a card of 80 GB, of the ladder or of `longseq bench`."""
    kept = results.file("end_to_end")
    found = [
        row | {"tokens": longest_tokens(row), "state": verdict_of_longest(row), "command": None}
        for row in kept["rows"]
        if row["name"] == SMALL_CARD and "tokens" in row.get("longest", {})
    ]
    for row in kept.get("bench", ()):
        held = row["gpus"] == 1 and row.get("card_gib") is not None
        if held and row["card_gib"] <= SMALL_CARD_GIB and not row.get("note"):
            found.append(row | {"state": row["kind"], "command": command(row)})
    if not found:
        raise MissingError(
            f"end_to_end.json has no longest sequence of {SMALL_CARD}, and no bench on its card"
        )
    best = max(found, key=lambda row: row["tokens"])
    results.use(best["environment"])
    return best


def _beside(results: Results, other: str, wanted: float) -> Found:
    """Our longest sequence on a card of 80 GB over that of another rung."""
    ours = _on_small_card(results)
    theirs = results.one("end_to_end", name=other)
    tokens, before = ours["tokens"], longest_tokens(theirs)
    text = (
        f"{tokens:,} tokens against {before:,}: {tokens / before:.3g} times, on a card that was held to "
        f"{ours['card_gib']:.1f} GiB; ours with {ours['optimizer']}, the other with {theirs['optimizer']} "
        f"({ours['state']}; {verdict_of_longest(theirs)})"
    )
    numbers = {"tokens": tokens, "tokens before": before, "ratio": tokens / before}
    return Found(text, reached(tokens / before, wanted), numbers, ours["command"])


def longer_than_plain(results: Results) -> Found:
    return _beside(results, "80gb-plain-no-checkpoints", 12)


def longer_than_checkpoints(results: Results) -> Found:
    return _beside(results, "80gb-plain", 4)


def sixty_thousand(results: Results) -> Found:
    row = _on_small_card(results)
    tokens = row["tokens"]
    text = f"{tokens:,} tokens on a card that was held to {row['card_gib']:.1f} GiB, {row['optimizer']} "
    text += f"({row['state']})"
    return Found(text, reached(tokens, 60_000), {"tokens": tokens}, row["command"])


def throughput_kept(results: Results) -> Found:
    """Streamed layers beside layer checkpoints, at the shortest length that both have."""
    speeds = []
    for name in ("plain", "mst"):
        row = results.one("end_to_end", name=name)
        speeds.append(
            {one["tokens"]: one["tokens_per_second"] for one in row["times"] if one.get("tokens_per_second")}
        )
    lengths = sorted(set(speeds[0]) & set(speeds[1]))
    if not lengths:
        raise MissingError("end_to_end.json has no length that both `plain` and `mst` were timed at")
    plain, ours = (one[lengths[0]] for one in speeds)
    text = f"{ours:,.0f} against {plain:,.0f} tokens/s at {lengths[0]:,} tokens: {ours / plain:.3g} times"
    numbers = {"tokens/s": ours, "tokens/s with checkpoints": plain, "ratio": ours / plain}
    return Found(text, reached(ours / plain, 3195 / 3271), numbers)


def head_memory(results: Results) -> Found:
    """By KiB a token: 80,000 tokens were not measured."""
    wanted = {"shape": "Llama-3-8B", "data": "zipf"}
    long = results.one("lm_head", "fwd+bwd MiB", key="exact-small", tokens=65536, **wanted)
    short = results.one("lm_head", "fwd+bwd MiB", key="exact-small", tokens=8192, **wanted)
    eager = results.one("lm_head", "fwd+bwd MiB", key="eager", tokens=8192, **wanted)
    mib = long["fwd+bwd MiB"]
    ours, theirs = mib * MIB / 65536 / 1024, 9.12e9 / 80_000 / 1024
    saved = 1 - short["fwd+bwd MiB"] / eager["fwd+bwd MiB"]
    text = (
        f"{mib:,.0f} MiB at 65,536 tokens, gradients included: {ours:.3g} KiB a token, where the paper's "
        f"9.12 GB are {theirs:.3g}; at 8,192 tokens {short['fwd+bwd MiB']:,.0f} MiB against "
        f"{eager['fwd+bwd MiB']:,.0f} ({-100 * saved:.3g} %)"
    )
    numbers = {"MiB": mib, "KiB/token": ours, "saved at 8,192 tokens": saved}
    return Found(text, reached(ours, theirs, lower=True), numbers)


# --- Cut Cross-Entropy ---

GEMMA = {"shape": "Gemma-2-2B", "data": "zipf", "tokens": 8192}


def loss_memory(results: Results) -> Found:
    eager = results.one("lm_head", "fwd MiB", key="eager", **GEMMA)["fwd MiB"]
    row = results.one("lm_head", "fwd MiB", key="exact-small", **GEMMA)
    ours = row["fwd MiB"]
    text = f"{eager:,.0f} MiB -> {ours:.2g} MiB (`memory_mib=290`)"
    return Found(text, reached(ours, 1, lower=True), {"MiB": ours, "MiB of eager": eager})


def gradient_memory(results: Results) -> Found:
    eager = results.one("lm_head", "fwd+bwd MiB", key="eager", **GEMMA)["fwd+bwd MiB"]
    row = results.one("lm_head", "fwd+bwd MiB", "beside dE, dW MiB", key="exact-small", **GEMMA)
    ours, beside = row["fwd+bwd MiB"], row["beside dE, dW MiB"]
    text = (
        f"{eager:,.0f} MiB -> {ours:,.0f} MiB (`memory_mib=290`), of which {ours - beside:,.0f} are the "
        "gradients themselves"
    )
    return Found(text, reached(ours, 1164, lower=True), {"MiB": ours, "MiB of eager": eager})


def loss_speed(results: Results) -> Found:
    """Where both run on one card, by that; the papers' milliseconds are another card's."""
    ms = {
        key: results.one("lm_head", "fwd+bwd ms", key=key, **GEMMA)["fwd+bwd ms"]
        for key in ("exact", "exact-small", "eager", "apple")
    }
    text = (
        f"{ms['exact-small']:.3g} ms in the memory above and {ms['exact']:.3g} ms with more, against "
        f"{ms['eager']:.3g} ms of plain PyTorch; the paper's own package took {ms['apple']:.3g} ms on this "
        f"GPU, {ms['apple'] / ms['exact-small']:.2f} times ours"
    )
    return Found(text, OTHER_MACHINE, ms)


def loss_curves(results: Results) -> Found:
    """The exact loss and the filtered one, each beside what roundings alone do."""
    names = ("told apart", "largest difference, smoothed", "held-out difference")
    ours = results.one("loss_curves", *names, run="cce")
    yardsticks = [row for row in results.all("loss_curves", *names[1:]) if row["run"].startswith("plain-")]
    if not yardsticks:
        raise MissingError("loss_curves.json has no yardstick")
    parts, numbers = [_curve("ours", ours)], {"largest": ours[names[1]], "held out": ours[names[2]]}
    filtered = [row for row in results.all("loss_curves", *names) if row["run"] == "cce-filtered"]
    parts += [_curve("with a filtered gradient", row) for row in filtered]
    largest = max(row[names[1]] for row in yardsticks)
    parts.append(f"runs of plain PyTorch that differ by roundings alone {largest:.2g}")
    verdict = "reached" if ours["told apart"] == "no" else "not reached: the curves can be told apart"
    if verdict == "reached" and any(row["told apart"] == "yes" for row in filtered):
        verdict = "reached, but not with a filtered gradient, which nothing chooses by itself"
    text = "largest difference to plain, smoothed over 20 steps: " + "; ".join(parts)
    return Found(text, verdict, numbers | {"largest of yardsticks": largest})


def _curve(what: str, row: Row) -> str:
    heldout = row["held-out difference"]
    return f"{what} {row['largest difference, smoothed']:.2g} (held out {heldout:+.2g})"


# --- APOLLO ---


def state_memory(results: Results) -> Found:
    adamw = results.one("optimizer", "state GiB", key="adamw-fused")["state GiB"]
    apollo, mini = (
        results.one("optimizer", "state elements", "formula", key=f"longseq-{name}-stochastic")
        for name in ("apollo", "mini")
    )
    exact = all(row["state elements"] == row["formula"] for row in (apollo, mini))
    text = (
        f"{mini['state elements']:,} numbers with APOLLO-Mini and {apollo['state elements']:,} at rank 256 "
        f"for the matrices of Llama-3-8B, {'as' if exact else 'NOT as'} the formula says: "
        f"{1024 * mini['state GiB']:.3g} MiB and {apollo['state GiB']:.3g} GiB in float32, where AdamW has "
        f"{adamw:.3g} GiB in bfloat16"
    )
    numbers = {"Mini": mini["state elements"], "rank 256": apollo["state elements"]}
    return Found(text, "reached" if exact else "not as the formula says", numbers)


def under_twelve(results: Results) -> Found:
    table = "optimizer_memory_llama_7b"
    row = results.one(table, "device GiB", key="int8-mini-in-backward")
    bf16 = results.one(table, "components", key="bf16-mini-in-backward")
    device_gb, peak_gb = (row[f"{name} GiB"] * 2**30 / 1e9 for name in ("device", "peak"))
    weights = bf16["components"]["weights"] * 2**30 / 2
    text = (
        f"{device_gb:.4g} GB of the GPU in use, context included, {peak_gb:.4g} GB allocated: a Llama of "
        f"{weights / 1e9:.2f}B weights, 4,096 tokens, layer inputs on the host"
    )
    numbers = {"device GB": device_gb, "peak GB": peak_gb}
    return Found(text, reached(device_gb, 12, lower=True), numbers)


def step_time(results: Results) -> Found:
    names = {"rank 256": "longseq-apollo-stochastic", "Mini": "longseq-mini-stochastic"}
    ratios = {name: results.one("optimizer", "/ AdamW", key=key)["/ AdamW"] for name, key in names.items()}
    text = f"{ratios['rank 256']:.2f} (rank 256) and {ratios['Mini']:.2f} (Mini) of fused AdamW's time"
    return Found(text, reached(max(ratios.values()), 0.159 / 0.173, lower=True), ratios)


def three_times(results: Results) -> Found:
    """The best of our cases at each length."""
    rows = results.all("batch_throughput", "tokens/s / AdamW")
    ours = [row for row in rows if "mini" in row["key"]]
    if not ours:
        raise MissingError("batch_throughput.json has no row of APOLLO-Mini beside AdamW's")
    parts = [
        f"{row['case']}, {row['length']:,} tokens: micro-batch {row['largest']:,}, "
        f"{row['tokens/s / AdamW']:.3g} times AdamW's tokens/s"
        for row in ours
    ]
    best = max(row["tokens/s / AdamW"] for row in ours)
    text = "one GPU held to the memory of an 80 GB card; " + "; ".join(parts)
    return Found(text, reached(best, 3), {"best": best})


def perplexity(results: Results) -> Found:
    name = "held-out perplexity"
    adamw = min(row[name] for row in results.all("optimizer_pretraining", name, run="adamw"))
    best = {
        run: min(row[name] for row in results.all("optimizer_pretraining", name, run=run))
        for run in ("apollo", "mini")
    }
    settings = results.file("optimizer_pretraining")["settings"]
    text = (
        f"AdamW {adamw:.2f}, APOLLO {best['apollo']:.2f}, APOLLO-Mini {best['mini']:.2f}: "
        f"{best['apollo'] / adamw:.3g} and {best['mini'] / adamw:.3g} times AdamW's, each at its best rate; "
        f"{settings['parameters'] / 1e6:.0f}M parameters, {settings['tokens'] / 1e6:.0f}M tokens"
    )
    short = reached(best["apollo"], adamw, lower=True)
    verdict = short if short == "reached" else "not reached: AdamW, tuned, is ahead"
    return Found(text, verdict, {"adamw": adamw, **best})


# --- Ulysses ---


def linear_in_gpus(results: Results) -> Found:
    rows = results.all("longest", "tokens")
    best = {row["gpus"]: row for row in sorted(rows, key=lambda row: row["tokens"])}
    longest = {gpus: row["tokens"] for gpus, row in best.items()}
    fewest = min(longest)
    if len(longest) < 2:
        raise MissingError("longest.json has one number of GPUs alone")
    shares = {gpus: longest[gpus] * fewest / (longest[fewest] * gpus) for gpus in sorted(longest)}
    text = ", ".join(f"{longest[gpus]:,} tokens on {gpus}" for gpus in shares) + " GPUs: "
    text += ", ".join(f"{share:.3g}" for gpus, share in shares.items() if gpus != fewest)
    text += f" of what {fewest} GPU{'s' if fewest > 1 else ''} would have in proportion"
    if all(row.get("host_gib") for row in best.values()):
        text += (
            "; with " + ", ".join(f"{best[gpus]['host_gib']:.0f}" for gpus in shares) + " GiB of host memory"
        )
    text += "; what was tried with `longseq bench`, longer ones may fit"
    least = min(shares.values())
    verdict = "reached" if least >= AS_GOOD else reached(least, 1)
    numbers = {str(gpus): tokens for gpus, tokens in longest.items()}
    return Found(text, verdict, numbers, command(best[max(best)]))


def volume(results: Results) -> Found:
    rows = results.all("sequence_parallel", "all-to-all MiB a layer", "predicted", system="ours", gpus=4)
    row = rows[0]
    counted, predicted = row["all-to-all MiB a layer"], row["predicted"]
    same = all(one["all-to-all MiB a layer"] == one["predicted"] for one in rows)
    text = (
        f"counted in {len(rows)} runs on 4 GPUs, all {'as' if same else 'NOT as'} the formula for grouped "
        f"heads says; {counted:,.0f} MiB a layer and step at {row['tokens']:,} tokens ({predicted:,.0f} "
        f"expected, {row['key']})"
    )
    return Found(text, "reached" if same else "not as the formula says", {"MiB a layer": counted})
