"""The page: what Gradio shows, and what happens when something is typed or clicked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

import gradio as gr

from foveate.ask.answer import Answer
from foveate.ask.conversation import Chat
from foveate.ask.foveate import Foveate
from foveate.demo.asking import (
    Settings,
    Talk,
    costs,
    drawn,
    layers,
    pictures,
    read,
    stream,
    switched_on,
)
from foveate.errors import FoveateError
from foveate.explaining.drawing import sentences
from foveate.explaining.faithfulness import Probe
from foveate.picture.limits import Limits

ALONE = "no second model"
QUESTIONS = (  # about signs.jpg, for the embedded model
    "what word is on the sign?",
    "what digit is on the red shape?",
    "what letter is on the blue shape?",
    "how many shapes are there?",
)
STYLE = """
.gradio-container { width: 100% !important; max-width: 96rem !important; margin: 0 auto !important; }
#picture img, .seen img { object-fit: contain; }
.costs table { font-variant-numeric: tabular-nums; width: 100%; border-collapse: collapse; }
.costs th { font-weight: 400; text-align: left; } .costs td { text-align: right; }
.costs th, .costs td { padding: .15rem .3rem; border-bottom: 1px solid var(--border-color-primary); }
#status { min-height: 1.6rem; }
#status .wrong { color: var(--error-text-color, #b91c1c); font-weight: 600; overflow-wrap: anywhere; }
footer { display: none !important; }
"""
EMPTY = """() => Array(2).fill([
  [],
  {choices: [], value: [], visible: false, __type__: "update"},
  {value: null, visible: false, __type__: "update"},
  null, "", "",
  {visible: false, __type__: "update"},
  {value: null, visible: false, __type__: "update"},
]).flat()"""


@dataclass(frozen=True)
class Column:
    """The part of the page that one model has."""

    box: gr.Column
    title: gr.Markdown
    said: gr.Chatbot
    layers: gr.CheckboxGroup
    seen: gr.Image
    views: gr.Gallery
    costs: gr.HTML
    notes: gr.Markdown
    why: gr.Button
    explained: gr.Image
    talk: gr.State

    @property
    def shown(self) -> list[Any]:
        """What an answer changes, in the order of `_full`."""
        return [*self.emptied, self.talk]

    @property
    def emptied(self) -> list[Any]:
        """What is empty before the first answer about a picture, in the order of `EMPTY`."""
        return [
            *(self.said, self.layers, self.seen, self.views, self.costs, self.notes, self.why),
            self.explained,
        ]


def theme() -> gr.themes.Base:
    """Gradio's own without fonts of other hosts."""
    return gr.themes.Default(
        primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )


class Page:
    """The page over some models.

    Args:
        models: by name, at least one.
        limits: on the pictures that are read.
        most_tokens: bound on the answers' length that visitors may choose.
        examples: whether the first model is the embedded one, for which there are examples.
    """

    def __init__(
        self, models: Mapping[str, Foveate], limits: Limits, most_tokens: int, examples: bool
    ) -> None:
        self.models, self.limits, self.most_tokens = dict(models), limits, most_tokens
        self.examples = examples

    def blocks(self) -> gr.Blocks:
        """Gradio's page."""
        names = list(self.models)
        with gr.Blocks(
            analytics_enabled=False, title="Foveate", delete_cache=(3600, 3600), fill_width=True
        ) as made:
            gr.Markdown("# Foveate\nAsk about a picture, and see where the model looked.")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    picture = gr.Image(
                        type="filepath",
                        image_mode=None,
                        sources=["upload", "clipboard"],
                        label="Picture",
                        elem_id="picture",
                        height=340,
                        buttons=["fullscreen"],
                    )
                    picture.preprocess = _path_of  # Gradio's own would decode the picture
                    question = gr.Textbox(
                        label="Question",
                        lines=1,
                        max_lines=4,
                        submit_btn=True,
                        elem_id="question",
                        autofocus=True,
                    )
                    status = gr.HTML("", elem_id="status", padding=False)
                    first = gr.Dropdown(names, value=names[0], label="Model", elem_id="model")
                    second = gr.Dropdown(
                        [ALONE, *names],
                        value=ALONE,
                        label="Beside it",
                        elem_id="second",
                        visible=len(names) > 1,
                    )
                    with gr.Accordion("Options", open=False):
                        tokens = gr.Slider(
                            1,
                            self.most_tokens,
                            min(256, self.most_tokens),
                            step=1,
                            label="Tokens of an answer, at most",
                        )
                        heat = gr.Slider(0, 2, 0, step=0.05, label="Temperature; 0 takes the most likely")
                        remember = gr.Checkbox(False, label="Each question sees what was said before")
                    if self.examples:
                        self._examples(picture, question)
                columns = [self._column(0), self._column(1)]
            asked = [picture, question, first, second, tokens, heat, remember]
            outputs = [part for column in columns for part in column.shown]
            question.submit(
                self.ask,
                [*asked, *(part for column in columns for part in (column.talk, column.said))],
                [
                    question,
                    *(column.box for column in columns),
                    *(column.title for column in columns),
                    *outputs,
                ],
                api_visibility="private",
                show_progress_on=status,  # it would cover the answers
            )
            # In the browser itself: an answer that came at once would be wiped away by a late reply.
            emptied = [part for column in columns for part in column.emptied]
            picture.change(None, None, emptied, js=EMPTY, show_progress="hidden", api_visibility="private")
            picture.change(
                self.look,
                [picture, first],
                status,
                api_visibility="private",
                show_progress_on=status,
                queue=False,  # at the end of a queued event, Gradio's page may miss one that has just begun
            )
            for column in columns:
                column.layers.input(
                    self.switch,
                    [column.layers, column.talk],
                    column.seen,
                    api_visibility="private",
                    show_progress="hidden",
                    queue=False,
                )
                column.why.click(
                    self.explain,
                    column.talk,
                    [column.explained, column.notes],
                    api_visibility="private",
                    show_progress_on=column.notes,
                )
        return made

    def _examples(self, picture: gr.Image, question: gr.Textbox) -> None:
        place = resources.files("foveate.demo").joinpath("signs.jpg")
        with resources.as_file(place) as path:
            gr.Examples(
                [[str(path), text] for text in QUESTIONS],
                [picture, question],
                label="Examples",
                api_visibility="private",
            )

    def _column(self, number: int) -> Column:
        with gr.Column(scale=3, min_width=300, visible=number == 0, elem_id=f"column-{number}") as box:
            title = gr.Markdown("", elem_classes="title")
            said = gr.Chatbot(
                label="Answers",
                height=210,
                render_markdown=False,
                buttons=["copy"],
                feedback_options=None,
                elem_classes="said",
            )
            switches = gr.CheckboxGroup([], label="Views and regions", visible=False, elem_classes="layers")
            seen = gr.Image(
                label="Where it looked",
                show_label=False,
                alt_text="Where it looked",
                interactive=False,
                visible=False,
                format="png",
                buttons=["fullscreen", "download"],
                elem_classes="seen",
            )
            why = gr.Button("What does the answer rest on?", visible=False, elem_classes="why")
            explained = gr.Image(
                label="What it rests on",
                show_label=False,
                alt_text="What it rests on",
                interactive=False,
                visible=False,
                format="png",
                buttons=["fullscreen", "download"],
                elem_classes="explained",
            )
            notes = gr.Markdown("", elem_classes="notes", sanitize_html=True)
            with gr.Accordion("Views and costs", open=False):
                views = gr.Gallery(
                    label="Views that the model was shown",
                    columns=4,
                    height=260,
                    interactive=False,
                    format="png",
                    buttons=["fullscreen"],
                    elem_classes="views",
                )
                table = gr.HTML("", elem_classes="costs")
            talk = gr.State(None)
        return Column(box, title, said, switches, seen, views, table, notes, why, explained, talk)

    def look(self, path: str | None, model: str) -> str:
        """Reads a new picture, so that one that cannot be read is an error at once."""
        said = ""
        try:
            if path is not None:
                read(path, self.limits, self.models[model])
        except FoveateError as error:
            said = f'<p role="alert" class="wrong">{escape(str(error))}</p>'
        return said

    def ask(
        self,
        path: str | None,
        question: str,
        first: str,
        second: str,
        tokens: float,
        temperature: float,
        remember: bool,
        *before: Any,
    ) -> Iterator[list[Any]]:
        """Answers a question by one model or two, piece by piece; `before`: each column's talk, and what it
        still shows of it."""
        with _shown_errors():
            if path is None:
                raise FoveateError("there is no picture: upload or paste one")
            names = [first] if second == ALONE else [first, second]
            settings = Settings(int(tokens), temperature, remember)
            columns = zip(before[::2], before[1::2], strict=True)
            talks = [
                self._talk(path, name, talk if said else None)
                for name, (talk, said) in zip(names, columns, strict=False)
            ]
            for talk in talks:
                talk.chat.check(question)
                talk.said = [*talk.said, _message("user", question), _message("assistant", "")]
            frame = [gr.skip(), gr.update(), gr.update(visible=len(talks) > 1)]
            frame += [f"### {escape(name)}" for name in names] + [""] * (2 - len(names))
            nothing: list[list[Any]] = [[gr.skip()] * 9 for _ in range(2)]
            parts = list(nothing)
            for number, talk in enumerate(talks):
                parts[number] = [talk.said, *nothing[number][1:]]
            yield [*frame, *parts[0], *parts[1]]
            try:
                for number, got in stream(talks, question, settings):
                    parts = list(nothing)
                    answer = talks[number].said[-1]
                    if isinstance(got, Answer):
                        answer["content"] = got.text or "(no text)"
                        parts[number] = self._full(talks[number], got)
                    else:
                        answer["content"] = (answer["content"] + got).lstrip()
                        parts[number] = [talks[number].said, *nothing[number][1:]]
                    yield [*frame, *parts[0], *parts[1]]
            except FoveateError:
                for talk in talks:  # what was not answered was not asked
                    talk.said = talk.said[:-2]
                    parts = [[talk.said, *nothing[0][1:]] for talk in talks] + nothing[len(talks) :]
                yield [*frame, *parts[0], *parts[1]]
                raise
            yield [gr.update(value=""), *[gr.skip()] * 4, *nothing[0], *nothing[1]]

    def _talk(self, path: str, name: str, before: Talk | None) -> Talk:
        """What was said so far, where it was about the same picture by the same model."""
        model = self.models[name]
        if before is not None and (before.model, before.path) == (name, path):
            return before
        return Talk(name, path, Chat(model.engine, read(path, self.limits, model)))

    def _full(self, talk: Talk, answer: Answer) -> list[Any]:
        """All that a whole answer shows."""
        found = layers(talk)
        names = list(found)
        chosen = switched_on(names)
        return [
            talk.said,
            gr.update(choices=names, value=chosen, visible=True),
            gr.update(value=drawn(answer.picture, {name: found[name] for name in chosen}), visible=True),
            pictures(talk.chat.views()),
            _table(costs(answer.ledger)),
            _paragraphs(answer.notes),
            gr.update(visible=True),
            gr.update(value=None, visible=False),
            talk,
        ]

    def switch(self, chosen: Sequence[str], talk: Talk | None) -> Any:
        """The picture with other layers."""
        if talk is None:
            return gr.skip()
        found = layers(talk)
        return drawn(talk.chat.picture, {name: found[name] for name in found if name in chosen})

    def explain(self, talk: Talk | None) -> list[Any]:
        """What the last answer rests on."""
        with _shown_errors():
            if talk is None:
                raise FoveateError("there is no answer to explain: ask a question first")
            explained = talk.chat.explain(probe=Probe(draws=4))
            return [
                gr.update(value=explained.show(), visible=True),
                _paragraphs(sentences(explained)),
            ]


class _shown_errors:
    """Wrong input becomes an error that the page shows until it is closed."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FoveateError):
            raise gr.Error(escape(str(error)), duration=None, print_exception=False) from error


def _path_of(payload: Any) -> str | None:
    """An uploaded picture as it is."""
    if payload is None:
        return None
    return str(payload.path or payload.url)


def _table(rows: Mapping[str, str]) -> str:
    cells = (
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _paragraphs(lines: Sequence[str]) -> str:
    """Lines as Markdown that shows every character as it is."""
    plain = (escape(line) for line in lines)
    return "\n\n".join("".join(f"\\{c}" if c in r"\`*_{}[]#+-.!|~$" else c for c in line) for line in plain)
