"""Tests that `make test` leaves out, beside those that are marked in their own files; `make slow` runs them.

A test, how the names of its cases begin, and the quick test that fails if what it guards breaks in one of the
usual ways; or a test and how those of its cases begin that `make test` runs, too.
"""

from __future__ import annotations

from typing import NamedTuple

PAGES = "docs/test_claims.py knows its options and commands; pages of the same kind run"
ALIKE = "other cases take the same way"
SEVERAL = ("llava_next", "qwen3_vl", "foveate-anyres")  # VLMs
COMMON = "train/test_run.py::test_every_method_trains"
FULL = "test_files.py::test_output_that_cannot_be_written_is_one_sentence"


class Slow(NamedTuple):
    """Cases of a test, all of them without a beginning, except those that begin as `quick` says."""

    test: str
    guard: str
    cases: tuple[str, ...] = ("",)
    quick: tuple[str, ...] = ()


def some(test: str, *quick: str) -> Slow:
    """Only some cases of a test are quick; the others take the same way."""
    return Slow(test, ALIKE, quick=quick)


SLOW = (
    Slow("evaluate/test_run.py::test_killed_and_on_two_processes", "test_the_same_answers_in_any_batch"),
    Slow("test_embedded.py::test_objects_of_a_ninth_of_a_photograph_are_read", "test_the_demo_is_answered"),
    Slow(
        "data/test_hub.py::test_only_the_first_rows_of_a_stream_are_downloaded",
        "test_a_folder_of_several_splits",
    ),
    Slow(
        "picture/test_limits.py::test_a_large_picture_is_in_memory_once", "test_a_bomb_is_refused_by_default"
    ),
    Slow(
        "model/test_sharing.py::test_without_the_package_it_is_named",
        "test_main_job.py::test_zoom_by_the_auto_classes",
    ),
    Slow("model/test_quantising.py::test_regions_of_zoom", "zoom/test_relevance.py", ("4bit", "8bit")),
    Slow(
        "methods/test_chain_of_spot.py::test_what_is_asked_of_the_answer_is_not_asked_of_the_region",
        "test_only_the_answer_is_streamed_and_the_box_is_bounded",
    ),
    Slow("methods/test_slime.py::test_every_stage_trains_its_part_alone", COMMON),
    Slow("methods/test_llava_hr.py::test_it_learns_from_a_fresh_start", COMMON),
    Slow("methods/test_inf_llava.py::test_both_stages_from_a_fresh_start", COMMON),
    Slow("methods/test_inf_llava.py::test_detail_reaches_the_llm_with_small_views", "parity/test_golden.py"),
    Slow("methods/test_seams.py::test_many_answers_with_dropped_tokens", "ask/test_context.py"),
    Slow("methods/test_outside.py::test_the_lab_compares_it", "lab/test_cells.py"),
    Slow(
        "lab/test_cells.py::test_a_method_that_asks_twice_is_measured_in_conversations",
        "test_every_method_trains_and_is_measured",
    ),
    Slow("lab/test_photographs.py::test_a_report_counts_every_answer", "lab/test_photographs.py"),
    Slow("lab/test_experiments.py::test_every_row_learns_in_every_stage", "lab/test_cells.py"),
    Slow(
        "train/test_run.py::test_a_stage_with_adapters_goes_on",
        "test_a_killed_run_goes_on_as_if_nothing_had_been",
    ),
    Slow("train/test_run.py::test_a_run_killed_after_its_last_step_takes_no_more", ALIKE, ("lora1",)),
    Slow(
        "train/test_run.py::test_what_trains_is_exact_in_a_model_of_bfloat16",
        ALIKE,
        ("coroi", "llava_hr", "inf_llava", "slime"),
    ),
    Slow(
        "clients/test_trl.py::test_a_loss_falls",
        ALIKE,
        ("slime-assistant", "slime-completions", "inf_llava-", "anyres-", "slime-preferences"),
    ),
    Slow(
        "clients/test_vllm.py::test_names_are_those_of_the_model_without_its_head",
        ALIKE,
        ("op", "phi", "gpt_neox", "gemma2", "gpt2", "mistral"),
    ),
    Slow("test_benchmarks.py::test_smallest_size", "clients/test_vllm.py", ("vllm_parity",)),
    Slow("test_choosing.py::test_several_methods_and_options_for_one_of_them", "test_choosing.py"),
    Slow("test_choosing.py::test_a_size_is_a_picture_of_that_size", "test_choosing.py"),
    Slow("picture/test_drawing.py::test_chains_of_any_length_are_drawn", ALIKE, ("529",)),
    Slow("ask/test_context.py::test_a_chat_answers_at_the_length_of_ask", "model/test_positions.py"),
    Slow(
        "ask/test_engine.py::test_eight_threads_answer_as_one",
        ALIKE,
        ("llava", "anyres", "slime", "inf_llava", "chain_of_spot"),
    ),
    Slow("test_annotate.py::test_as_many_are_checked_as_were_asked_for", ALIKE, ("500", "6")),
    Slow("data/test_shards.py::test_they_train_a_model", ALIKE, ("write_tars", "write_saved")),
    Slow(
        "model/test_cost.py::test_equal_layers_are_counted_once",
        ALIKE,
        ("qwen2", "mistral", "mixture", "attention of two kinds", "dense and mixed", "gpt2"),
    ),
    Slow("model/test_foreign.py::test_the_projector_s_activation", ALIKE, ("gelu_",)),
    Slow(
        "zoom/test_unloaded.py::test_tokens_are_those_of_the_processor",
        ALIKE,
        ("llava]", "llava_siglip", "llava_onevision", "idefics3", "gemma3", "llava_next"),
    ),
    Slow(
        "zoom/test_unloaded.py::test_released_shapes",
        ALIKE,
        ("llava_onevision", "qwen3_vl-4000", "smolvlm-4000", "internvl-2000"),
    ),
    Slow(
        "docs/test_commands.py::test_page_runs",
        PAGES,
        (
            "docs/evaluating.md",
            "docs/install.md",
            "docs/methods/",
            "docs/lab.md",
            "docs/zoom.md",
            "docs/data.md",
            "docs/duel.md",
            "docs/choosing.md",
            "docs/training.md",
            "docs/asking.md",
            "docs/explaining.md",
            "docs/clients.md",
            "docs/checkpoints.md",
        ),
    ),
    Slow("test_files.py::test_a_command_on_a_full_disk", FULL),
    Slow("test_files.py::test_training_goes_on_exactly_after_a_full_disk", FULL),
    Slow("test_files.py::test_a_full_disk_leaves_the_model_that_was_there", FULL),
    Slow("test_files.py::test_the_labs_pictures_on_a_full_disk", FULL),
    Slow(
        "test_wheel.py::test_an_installed_wheel_works_without_a_clone",
        "test_every_file_of_the_package_is_in_the_wheel",
    ),
    Slow(
        "model/test_sharing.py::test_every_auto_class_finds_ours",
        "test_main_job.py::test_zoom_by_the_auto_classes",
    ),
    Slow(
        "core/test_imports.py::test_orders_of_imports",
        "test_no_import_runs_upwards, and the other case",
        ("True",),
    ),
    Slow("demo/test_page.py::test_two_models_on_a_phone", "test_upload_ask_and_look"),
    Slow("model/test_pushing.py::test_a_model_is_pushed_whole_and_loads_elsewhere", "the others of the file"),
    Slow("methods/test_outside.py::test_the_duel_gets_it_by_one_command", "test_every_command_knows_it"),
    Slow("lab/test_cells.py::test_an_experiment_is_a_file", "test_a_row_of_an_experiment_becomes_a_model"),
    Slow("lab/test_cells.py::test_a_cells_command_makes_the_same_cell", ALIKE, ("3",)),
    Slow("train/test_adapter.py::test_every_door_puts_it_on_its_base", ALIKE, ("coroi",)),
    Slow(
        "model/test_quantising.py::test_every_method_answers",
        ALIKE,
        ("coroi", "chain_of_spot", "slime", "inf_llava", "llava_hr", "anyres"),
    ),
    Slow("train/test_two_processes.py::test_two_processes_train_as_one", ALIKE, ("coroi",)),
    Slow("clients/test_trl.py::test_a_reward_rises", ALIKE, ("slime",)),
    Slow(
        "clients/test_vllm.py::test_no_picture_has_more_tokens_than_the_fullest",
        ALIKE,
        (
            "slime",
            "anyres",
        ),
    ),
    Slow(
        "docs/test_which_method.py::test_what_a_method_asks",
        ALIKE,
        ("coroi", "anyres", "chain_of_spot", "inf_llava", "llava_hr"),
    ),
    Slow(
        "evaluate/test_run.py::test_the_same_answers_in_any_batch",
        ALIKE,
        ("chain_of_spot", "anyres", "inf_llava", "llava_hr"),
    ),
    Slow("methods/test_inf_llava.py::test_exactly_the_dead_views_are_left_out", ALIKE, ("tiles4",)),
    Slow(
        "methods/test_invariants.py::test_a_copy_answers_alike",
        ALIKE,
        ("coroi", "anyres", "inf_llava", "llava_hr", "slime", "chain_of_spot"),
    ),
    Slow("methods/test_llava_hr.py::test_pictures_of_any_size", ALIKE, ("size2",)),
    Slow("model/test_folders.py::test_an_adapter_of_transformers_own_llava", ALIKE, ("dora", "pattern")),
    Slow(
        "model/test_folders.py::test_every_door_takes_the_revision_and_subfolder",
        ALIKE,
        ("False-place1", "True-place1", "False-place2", "False-place3", "True-place2", "True-place3"),
    ),
    Slow(
        "model/test_rendering.py::test_all_others_render_as_in_transformers",
        ALIKE,
        (
            "800-None-bare",
            "800-None-mistral",
            "800-None-chatml",
            "800-None-plain",
            "800-tools1",
            "800-None-whole",
        ),
    ),
    Slow(
        "model/test_spoilt.py::test_spoilt_parts",
        ALIKE,
        (
            "llava-image_processor",
            "llava-vision_config",
            "own-",
        ),
    ),
    Slow("model/test_spoilt.py::test_spoilt_values", ALIKE, ("LLM-config", "own-")),
    Slow(
        "parity/test_export.py::test_the_same_bits",
        ALIKE,
        (
            "anyres, other grids",
            "llava, last layer",
            "llava, siglip",
            "llava, squash",
            "llava, tied",
            "llava, pad",
        ),
    ),
    Slow(
        "serve/test_scheduler.py::test_every_answer_is_the_one_alone",
        ALIKE,
        ("chain_of_spot", "inf_llava", "anyres"),
    ),
    Slow("train/test_run.py::test_a_killed_run_goes_on_as_if_nothing_had_been", ALIKE, ("in the second",)),
    Slow("batch/test_batch.py::test_a_kill_in_the_middle", "test_annotate.py::test_kill_in_the_middle"),
    Slow("lab/test_tool.py::test_the_smallest_scale_needs_no_preparation", "test_main_job.py::test_lab"),
    Slow("train/test_adapter.py::test_on_the_stage_before_it", "test_every_door_puts_it_on_its_base"),
    Slow(
        "data/test_streaming.py::test_a_large_file_takes_the_memory_of_its_blocks", "the others of the file"
    ),
    Slow("model/test_quantising.py::test_other_layouts_and_adapters", ALIKE, ("8bit",)),
    Slow("serve/test_mcp.py::test_over_standard_input_and_output", "the others of the file, in memory"),
    Slow(
        "train/test_scoring.py::test_training_does_not_notice",
        "test_scores_come_every_so_many_steps_and_at_the_end",
    ),
    Slow("train/test_run.py::test_each_stage_trains_its_parts", "test_every_method_trains"),
    Slow("train/test_run.py::test_a_stage_may_leave_a_part_of_the_method_alone", "test_every_method_trains"),
    Slow("model/test_card.py::test_its_commands_work", "the others of the file"),
    Slow("model/test_cost.py::test_a_price_counts_every_look_and_the_injection", "the others of the file"),
    Slow(
        "model/test_cost.py::test_a_text_of_any_length_costs_what_a_run_of_it_counts",
        "the others of the file",
    ),
    Slow(
        "lab/test_curves.py::test_an_interrupted_cell_turns_where_an_uninterrupted_one_does",
        "lab/test_cells.py::test_an_interrupted_cell_ends_where_an_uninterrupted_one_does",
    ),
    Slow("lab/test_curves.py::test_measuring_changes_nothing_in_training", "the others of the file"),
    Slow(
        "lab/test_tool.py::test_a_budget_stops_a_run_which_goes_on",
        "lab/test_cells.py::test_an_interrupted_cell_ends_where_an_uninterrupted_one_does",
    ),
    Slow("lab/test_tool.py::test_the_disk_is_told_before_it_is_taken_and_cleaned", "the others of the file"),
    Slow("lab/test_cells.py::test_how_often_the_object_was_found_is_told", "lab/test_told.py"),
    Slow("lab/test_cells.py::test_a_method_may_be_told_where_to_look", "lab/test_told.py"),
    Slow("test_choosing.py::test_layouts_that_foveate_reads_are_priced_as_methods", "test_choosing.py"),
    Slow(
        "train/test_adapter.py::test_what_an_adapter_cannot_hold_is_refused",
        "test_every_door_puts_it_on_its_base",
    ),
    Slow("data/test_streaming.py::test_a_list_is_read_wherever_blocks_end", "the others of the file"),
    some("explaining/test_explanation.py::test_half_precision", "coroi", "llava]"),
    some("ask/test_compiled.py::test_the_tower_is_compiled", "llava_hr", "slime"),
    some(
        "ask/test_context.py::test_kept_and_read_anew_say_the_same", "coroi", "chain_of_spot", "anyres", "toy"
    ),
    some("model/test_base_model.py::test_any_llm_without_its_head", "gpt2", "qwen3"),
    some(
        "model/test_base_model.py::test_its_states_under_the_head_are_the_logits", "coroi", "llava]", "slime"
    ),
    some("model/test_modeling.py::test_any_decoder", "gpt2", "gemma2", "qwen3"),
    some(
        "zoom/test_unloaded.py::test_costs_are_those_of_the_network_as_it_runs",
        "llava]",
        "qwen2_5_vl",
        "llava_next",
        "internvl",
    ),
    some(
        "zoom/test_unloaded.py::test_without_a_tokenizer_tokens_are_the_same",
        "llava]",
        "qwen3_vl",
        "idefics3",
    ),
    some(
        "core/test_composing.py::test_language_models_keep_their_weights", "qwen3", "gpt_neox", "llama tied"
    ),
    some("test_cli.py::test_tiny_is_tiny_for_every_method", "coroi", "llava]"),
    some("zoom/test_zoom.py::test_words_without_a_box_leave_the_whole_picture", *SEVERAL),
    some("zoom/test_zoom.py::test_given_box", *SEVERAL),
    some("zoom/test_relevance.py::test_row_is_that_of_the_whole_sigma", *SEVERAL),
    some("zoom/test_relevance.py::test_in_inference_mode", *SEVERAL),
    some("zoom/test_relevance.py::test_what_changes_is_where_the_picture_changed", *SEVERAL),
    some("methods/test_inf_llava.py::test_gradients_are_those_of_the_full_form", "tiles1"),
    some("methods/test_inf_llava.py::test_what_is_left_out_changes_nothing", "3-", "6-tiles4"),
    some("methods/test_invariants.py::test_linear_layers_may_be_quantised", "coroi", "llava]", "toy"),
    some(
        "methods/test_invariants.py::test_adapters_on_every_linear_layer_learn_and_merge",
        "coroi",
        "llava]",
        "toy",
    ),
    some("methods/test_invariants.py::test_bfloat16", "coroi", "llava]", "toy"),
    some(
        "methods/test_coroi.py::test_every_option_trains_and_batch_equals_single",
        "weighted",
        "v2",
        "all",
        "gumbel",
    ),
    some("methods/test_slime.py::test_released_checkpoints_load", "safetensors", "bin"),
    some("methods/test_inf_llava.py::test_released_checkpoints_load", "safetensors", "bin"),
    some("model/test_spoilt.py::test_spoilt_indices", "llava-", "LLM-"),
    some("model/test_spoilt.py::test_spoilt_json", "llava-", "llava by Zoom"),
    some("model/test_spoilt.py::test_spoilt_weights", "llava-", "next by Zoom"),
    some("model/test_text.py::test_parts_that_are_none", "vicuna_v1", "mistral"),
    some("model/test_text.py::test_answers_are_found_in_a_text", "vicuna_v1", "bare"),
    some("parity/test_transformers.py::test_extreme_sizes", "pad-v5", "crop-v5"),
    some("parity/test_transformers.py::test_each_size_alone", "next-v5", "pad-v4", "crop-v5"),
    some("parity/test_transformers.py::test_pipeline", "next-v5", "pad-v4"),
    some("parity/test_transformers.py::test_pipeline_from_a_folder", "next-v5", "pad-v4"),
    some("parity/test_transformers.py::test_beams_and_several_answers", "next-v5", "pad-v4"),
    some("clients/test_lmms.py::test_it_asks_as_ask_does", "coroi", "chain_of_spot", "anyres"),
    some("model/test_folders.py::test_an_adapter_is_merged_into_its_base", "names", "dora", "pattern"),
)
