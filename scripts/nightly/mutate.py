"""Break the method in one place at a time and see that a test notices: `make mutate`.

Each row of MUTATIONS says what is broken, how, and which test must fail. The work happens in a copy of the tracked files.
A row whose text is no longer in the source, whose test passes although the code is broken, or whose test fails anyway, is an
error: the list has to stay true. Rows are the items that the method rests on, not a sample of all possible changes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutation(NamedTuple):
    what: str
    module: str  # cocoa_lib/MODULE.py
    old: str  # first occurrence
    new: str
    test: str  # tests/TEST: a file, or file::test


MUTATIONS = (
    # attention
    Mutation("EOS does not look at the others", "attention", "(seg_q == seg_k) | (seg_q == EOS) | (seg_k == EOS)",
             "(seg_q == seg_k) | (seg_k == EOS)", "test_attention.py::test_the_papers_figure"),
    Mutation("strict EOS looks at B", "attention", "((seg_q == EOS) & (seg_k == A))", "(seg_q == EOS)",
             "test_attention.py::test_strict_differs_only_where_eos_looks_at_b"),
    Mutation("padding is looked at", "attention", "return (seg_k != PAD) & (", "return (",
             "test_attention.py::test_padding_is_seen_by_nobody_and_no_row_is_empty"),
    Mutation("padding rows are empty", "attention", "((seg_q == PAD) | allowed)", "(seg_q != PAD) & allowed",
             "test_attention.py::test_padding_is_seen_by_nobody_and_no_row_is_empty"),
    Mutation("packed samples see each other", "attention", "allowed = allowed & (sample_ids[b, q] == sample_ids[b, k])", "pass",
             "test_packing.py::test_every_token_once_in_order_and_samples_do_not_see_each_other"),
    Mutation("the Flex mask turned round", "attention", "create_block_mask(may_attend,",
             "create_block_mask(lambda b, h, q, k: may_attend(b, h, k, q),",
             "test_attention.py::test_flex_mask_is_the_dense_mask"),
    Mutation("all can know all at once", "show/masks", "unweighted=True) <= layers)", "unweighted=True) >= 0)",
             "test_attention.py::test_reachability_a_and_b_meet_only_through_eos"),
    # inputs
    Mutation("no EOS", "inputs", "middle = [self.eos_id] if eos or ids_b is not None else []", "middle = []",
             "test_inputs.py::test_eos_stands_once_and_last_on_both_padding_sides"),
    Mutation("padding known by its id", "inputs", "real = segment_ids != PAD", "real = input_ids != self.pad_id",
             "test_inputs.py::test_eos_that_is_the_padding_token_survives"),
    Mutation("users can type control tokens", "inputs", "split_special_tokens=True", "split_special_tokens=False",
             "test_inputs.py::test_a_user_cannot_type_a_control_token"),
    Mutation("truncation cuts from the end, whatever is there", "inputs", "text_at[len(text_at) - n_drop :]",
             "range(len(ids) - n_drop, len(ids))", "test_inputs.py::test_truncation_never_cuts_images_or_eos"),
    Mutation("padding always on the right", "inputs", 'if self.padding_side == "left"', "if False",
             "test_inputs.py::test_eos_stands_once_and_last_on_both_padding_sides"),
    # backbone
    Mutation("the attention switch does nothing", "backbone", "text.config.is_causal = not bidirectional", "pass",
             "test_backbone.py::test_the_switch_takes_in_every_family_and_backend"),
    Mutation("positions know nothing of images", "positions", "positions[:, cells] += inside", "pass",
             "test_backbone.py::test_positions_are_three_dimensional_where_there_is_an_image"),
    Mutation("positions left to the model", "backbone", "position_ids=position_ids(model, batch),", "position_ids=None,",
             "test_backbone.py::test_embedding_alone_batched_and_padded_left_is_the_same"),
    Mutation("a broken switch is not refused", "backbone", "if torch.equal(first, second) == bidirectional:", "if False:",
             "test_backbone.py::test_a_broken_switch_is_refused_at_opening"),
    Mutation("EOS taken for the last position by count", "backbone",
             'position = (batch["segment_ids"] == EOS).int().argmax(dim=1)', 'position = batch["attention_mask"].sum(1) - 1',
             "test_backbone.py::test_embedding_alone_batched_and_padded_left_is_the_same"),
    Mutation("an adapter misses a published target", "run/adapters", "qkv fc1", "fc1",
             "test_backbone.py::test_adapters_match_the_published_targets_and_merge_exactly"),
    # reconstruction, contrastive
    Mutation("MNTP without its shift", "reconstruction", "_cross_entropy_at(hidden[:, :-1], lm_head, labels[:, 1:])",
             "_cross_entropy_at(hidden, lm_head, labels)",
             "test_reconstruction.py::test_mntp_predicts_from_the_state_before_and_mlm_from_the_same"),
    Mutation("predictions beside their labels", "reconstruction", "lm_head(states[chosen]).float(), labels[chosen])",
             "lm_head(states[chosen]).float().flip(0), labels[chosen])",
             "test_reconstruction.py::test_mntp_predicts_from_the_state_before_and_mlm_from_the_same"),
    Mutation("visible patches count", "reconstruction", "F.mse_loss(predicted[hidden].float(), target[hidden])",
             "F.mse_loss(predicted.float(), target)",
             "test_reconstruction.py::test_patch_loss_perfect_is_zero_and_visible_cells_do_not_count"),
    Mutation("copies of the positive are negatives", "contrastive",
             "scores = scores.masked_fill(exclude & ~own, -torch.inf)", "pass",
             "test_contrastive.py::test_copies_of_the_positive_are_no_negatives"),
    Mutation("temperature multiplies", "contrastive", "/ temperature", "* temperature",
             "test_contrastive.py::test_info_nce_is_the_softmax_written_out"),
    Mutation("a causal patch decoder", "reconstruction", "if flash else layout_mask(model, batch, layout)",
             'if flash else layout_mask(model, batch, "causal")',
             "test_reconstruction.py::test_the_decoder_predicts_every_pixel_of_a_cell_from_all_tokens"),
    Mutation("two processes weigh alike, however few tokens one has", "reconstruction",
             "text, image = text * text_share, image * image_share", "pass",
             "test_reconstruction.py::test_shares_make_the_average_over_processes_exact"),
    Mutation("embeddings stay in the order of their length", "contrastive", "embedded[i][order.argsort()]", "embedded[i]",
             "test_contrastive.py::test_chunks_of_sorted_rows_have_the_loss_and_gradients_of_the_full_batch"),
    Mutation("pictures stay where rows are sorted", "packing", "parts[image] for image in images.tolist()",
             "parts[image] for image in images.sort().values.tolist()",
             "test_contrastive.py::test_chunks_of_sorted_rows_have_the_loss_and_gradients_of_the_full_batch"),
    # corruption, recipes
    Mutation("corruption depends on the place in the batch", "corruption",
             "rng = np.random.default_rng([seed, draw, TEXT_STREAM])", "rng = np.random.default_rng([seed, row, TEXT_STREAM])",
             "test_reconstruction.py::test_mask_text_rate_seed_and_order"),
    Mutation("a sample may have nothing masked", "corruption", "hide[rng.integers(len(places))] |= not hide.any()", "pass",
             "test_reconstruction.py::test_at_least_one_masked_and_none_where_nothing_is_allowed"),
    Mutation("special tokens are masked", "corruption", " & ~torch.isin(ids, torch.tensor(sorted(special)))", "",
             "test_reconstruction.py::test_only_plain_text_of_the_segment_is_masked"),
    Mutation("parts of merged cells are hidden", "corruption", "hidden.repeat_interleave(merge_size**2)",
             "hidden.repeat(merge_size**2)", "test_reconstruction.py::test_mask_cells_hides_whole_merged_cells"),
    Mutation("stage 2 masks A", "corruption", "recipe, seed, segment=B)", "recipe, seed, segment=A)",
             "test_reconstruction.py::test_stage2_loss_is_on_masked_b_only_and_its_first_token_comes_from_eos"),
    Mutation("the figure's patch rate is the script's", "recipes",
             '"figure": dict(text_mask_rate=0.2, patch_mask_rate=0.5',
             '"figure": dict(text_mask_rate=0.2, patch_mask_rate=0.3',
             "test_reconstruction.py::test_presets_are_the_sources_numbers"),
    # runs
    Mutation("collapse is not counted", "run/trainers", "self.steps_at_chance + 1 if at_chance else 0", "0",
             "test_train.py::test_collapse_is_reported_once_with_what_to_try"),
    Mutation("any parent will do", "run/stage", 'if meta.get("stage") != PARENT_STAGE[stage] and not allow_parent', "if False",
             "test_train.py::test_a_stage_starts_from_the_one_before_unless_told"),
    Mutation("stages 1 and 2 take rows at random", "run/trainers", 'train_sampling_strategy="sequential"',
             'train_sampling_strategy="random"',
             "test_train.py::test_stages_1_and_2_take_the_rows_in_the_order_of_the_plan"),
    Mutation("stage 3 takes rows at random", "run/trainers", "BatchSampler(SequentialSampler(dataset)",
             "BatchSampler(torch.utils.data.RandomSampler(dataset)",
             "test_train.py::test_stage_3_takes_the_rows_in_the_order_of_the_plan"),
    # evaluation, embedder, checkpoints
    Mutation("ties count for the answer", "evaluate/score", "1 + better + tied", "1 + better",
             "test_score.py::test_an_oracle_scores_100_and_equal_embeddings_0_but_100_by_the_public_rule"),
    Mutation("altered files of a checkpoint are read", "store/checkpoint", "if file_hash(path) != digest:", "if False:",
             "test_embedder.py::test_a_missing_or_torn_file_of_a_checkpoint_is_named"),
    Mutation("a bad item is not named", "embedder", "self._name_bad_item(given)", "pass",
             "test_embedder.py::test_a_bad_item_is_named_by_its_place_and_its_file"),
    Mutation("short vectors are not of length 1", "embedder", "truncate_dim is not None", "False",
             "test_embedder.py::test_smaller_vectors_are_sentence_transformers_own"),
)  # fmt: skip


def run_test(folder: Path, test: str) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", f"tests/{test}", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    return done.returncode, done.stdout[-1500:]


def copy_tracked(folder: Path) -> None:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout  # noqa: S607
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def try_mutation(folder: Path, mutation: Mutation) -> str:
    """ "caught", or what is wrong with this row."""
    path = folder / "cocoa_lib" / f"{mutation.module}.py"
    source = path.read_text(encoding="utf-8")
    if mutation.old not in source:
        return "ABSENT: the text to break is not in the module; mend the row"
    path.write_text(source.replace(mutation.old, mutation.new, 1), encoding="utf-8")
    code, output = run_test(folder, mutation.test)
    path.write_text(source, encoding="utf-8")
    if code == 1:
        return "caught"
    return (
        "SURVIVED: the test passes although the code is broken" if code == 0 else f"NO RESULT (pytest {code}): {output}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose module or description holds this")
    chosen = [row for row in MUTATIONS if (word := parser.parse_args().only) in row.module or word in row.what]
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / "main"
        folder.mkdir()
        copy_tracked(folder)
        failing = [test for test in sorted({row.test for row in chosen}) if run_test(folder, test)[0]]
        for test in failing:
            print(f"FAILS UNBROKEN: {test}")
        wrong = len(failing)
        for row in chosen:
            start = time.monotonic()
            result = try_mutation(folder, row)
            wrong += result != "caught"
            print(
                f"{result:8s} {row.module:11s} {row.what} -> {row.test} ({time.monotonic() - start:.0f} s)", flush=True
            )
    print(f"{len(chosen)} mutations, {wrong} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
