"""Tests that `make test` leaves out, beside those that are marked in their own files; `make slow` runs them.

A test, and how the names of its cases begin -> the quick test that fails if what it guards breaks in one of
the usual ways.
"""

from __future__ import annotations

PAGES = "docs/test_claims.py knows its options and commands; pages of the same kind run"
ALIKE = "other cases take the same way"
COMMON = "train/test_run.py::test_every_method_trains"

SLOW: dict[tuple[str, str], str] = {
    (
        "evaluate/test_run.py::test_killed_and_on_two_processes",
        "",
    ): "test_the_same_answers_in_any_batch",
    ("test_files.py::test_a_command_on_a_full_disk", "compose"): ALIKE,
    ("docs/test_commands.py::test_page_runs", "docs/methods/"): PAGES,
    ("docs/test_commands.py::test_page_runs", "docs/lab.md"): PAGES,
    ("docs/test_commands.py::test_page_runs", "docs/choosing.md"): "test_choosing.py",
    ("test_embedded.py::test_objects_of_a_ninth_of_a_photograph_are_read", ""): "test_the_demo_is_answered",
    (
        "data/test_hub.py::test_only_the_first_rows_of_a_stream_are_downloaded",
        "",
    ): "test_a_folder_of_several_splits",
    (
        "picture/test_limits.py::test_a_large_picture_is_in_memory_once",
        "",
    ): "test_a_bomb_is_refused_by_default",
    ("model/test_sharing.py::test_without_the_package_it_is_named", ""): "test_every_auto_class_finds_ours",
    ("model/test_quantising.py::test_regions_of_zoom", "4bit"): ALIKE,
    ("methods/test_chain_of_spot.py::test_what_is_asked_of_the_answer_is_not_asked_of_the_region", ""): (
        "test_only_the_answer_is_streamed_and_the_box_is_bounded"
    ),
    ("methods/test_slime.py::test_every_stage_trains_its_part_alone", ""): COMMON,
    ("methods/test_llava_hr.py::test_it_learns_from_a_fresh_start", ""): COMMON,
    ("methods/test_inf_llava.py::test_both_stages_from_a_fresh_start", ""): COMMON,
    ("methods/test_inf_llava.py::test_detail_reaches_the_llm_with_small_views", ""): "parity/test_golden.py",
    ("methods/test_seams.py::test_many_answers_with_dropped_tokens", ""): "ask/test_context.py",
    ("methods/test_outside.py::test_the_lab_compares_it", ""): "lab/test_cells.py",
    ("lab/test_cells.py::test_a_method_that_asks_twice_is_measured_in_conversations", ""): (
        "test_every_method_trains_and_is_measured"
    ),
    ("lab/test_photographs.py::test_a_report_counts_every_answer", ""): "lab/test_photographs.py",
    ("lab/test_experiments.py::test_every_row_learns_in_every_stage", ""): "lab/test_cells.py",
    (
        "train/test_run.py::test_a_stage_with_adapters_goes_on",
        "",
    ): "test_a_killed_run_goes_on_as_if_nothing_had_been",
    ("train/test_run.py::test_a_run_killed_after_its_last_step_takes_no_more", "lora1"): ALIKE,
    ("train/test_run.py::test_what_trains_is_exact_in_a_model_of_bfloat16", "llava_hr"): ALIKE,
    ("train/test_run.py::test_what_trains_is_exact_in_a_model_of_bfloat16", "inf_llava"): ALIKE,
    ("train/test_run.py::test_what_trains_is_exact_in_a_model_of_bfloat16", "slime"): ALIKE,
    ("clients/test_trl.py::test_a_loss_falls", "slime-assistant"): ALIKE,
    ("clients/test_trl.py::test_a_loss_falls", "slime-completions"): ALIKE,
    ("clients/test_trl.py::test_a_loss_falls", "inf_llava-"): ALIKE,
    ("clients/test_trl.py::test_a_loss_falls", "anyres-"): ALIKE,
    ("clients/test_vllm.py::test_names_are_those_of_the_model_without_its_head", "op"): ALIKE,
    ("clients/test_vllm.py::test_names_are_those_of_the_model_without_its_head", "phi"): ALIKE,
    ("clients/test_vllm.py::test_names_are_those_of_the_model_without_its_head", "gpt_neox"): ALIKE,
    ("clients/test_vllm.py::test_names_are_those_of_the_model_without_its_head", "gemma2"): ALIKE,
    ("test_benchmarks.py::test_smallest_size", "vllm_parity"): "clients/test_vllm.py",
    ("test_choosing.py::test_several_methods_and_options_for_one_of_them", ""): "test_choosing.py",
    ("test_choosing.py::test_a_size_is_a_picture_of_that_size", ""): "test_choosing.py",
    ("picture/test_drawing.py::test_chains_of_any_length_are_drawn", "529"): ALIKE,
    ("ask/test_context.py::test_a_chat_answers_at_the_length_of_ask", ""): "model/test_positions.py",
    ("ask/test_engine.py::test_eight_threads_answer_as_one", "llava"): ALIKE,
    ("ask/test_engine.py::test_eight_threads_answer_as_one", "anyres"): ALIKE,
    ("ask/test_engine.py::test_eight_threads_answer_as_one", "slime"): ALIKE,
    ("ask/test_engine.py::test_eight_threads_answer_as_one", "inf_llava"): ALIKE,
    ("test_annotate.py::test_as_many_are_checked_as_were_asked_for", "500"): ALIKE,
    ("test_annotate.py::test_as_many_are_checked_as_were_asked_for", "6"): ALIKE,
    ("data/test_shards.py::test_they_train_a_model", "write_tars"): ALIKE,
    ("data/test_shards.py::test_they_train_a_model", "write_saved"): ALIKE,
    ("model/test_cost.py::test_equal_layers_are_counted_once", "qwen2"): ALIKE,
    ("model/test_cost.py::test_equal_layers_are_counted_once", "mistral"): ALIKE,
    ("model/test_cost.py::test_equal_layers_are_counted_once", "mixture"): ALIKE,
    ("model/test_foreign.py::test_the_projector_s_activation", "gelu_"): ALIKE,
    ("zoom/test_unloaded.py::test_tokens_are_those_of_the_processor", "llava_siglip"): ALIKE,
    ("zoom/test_unloaded.py::test_tokens_are_those_of_the_processor", "llava_onevision"): ALIKE,
    ("zoom/test_unloaded.py::test_released_shapes", "llava_onevision"): ALIKE,
}
