"""Renders conversations with Hugging Face transformers, for the chat templates' tests.

    python make_chat.py [--teacher FILE.gguf] [--templates FOLDER --out FILE.json]

writes chat.json beside itself: templates (written for these tests, in the manner of well-known ones), conversations,
and what `apply_chat_template` makes of each pair, with the character ranges of `{% generation %}` blocks. With a
teacher it also writes chat_teacher.json: token ids of the same conversations by that model's own tokenizer and
template, and which of them the assistant says. With a folder of templates (`*.jinja`, of anybody) it writes what they make of
the conversations to FILE.json instead; the tests read that too where CASKD_CHAT_CASES names it. Wants transformers 4.57, jinja2 3.1, gguf, torch.
"""

import argparse
import datetime
import json
import pathlib

from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent
DATE = datetime.datetime(2026, 11, 26)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

TEMPLATES = {
    # Turns between <|im_start|> and <|im_end|>; a system message is added where there is none.
    "chatml": """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nYou answer briefly.<|im_end|>\\n' }}
{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}""",
    # Headers with roles, contents trimmed, one end token a turn.
    "headers": """{{- bos_token }}
{%- for message in messages %}
    {%- set head = '<|start|>' ~ message.role ~ '<|stop|>\\n\\n' %}
    {{- head + (message.content | trim) + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|stop|>\\n\\n' }}{% endif %}""",
    # A line for the role, then the text and the end of sequence.
    "lines": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    # Questions in brackets, the system message inside the first of them, no generation prompt, strict alternation.
    "brackets": """{%- set state = namespace(system='') -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set state.system = '<<' + messages[0]['content'].strip() + '>>\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('user and assistant must alternate') }}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{ bos_token + '[Q] ' + (state.system if loop.first else '') + message['content'].strip() + ' [/Q]' }}
    {%- else -%}
        {{ ' ' + message['content'].strip() + ' ' + eos_token }}
    {%- endif -%}
{%- endfor -%}""",
    # Tools and their calls as JSON, today's date, tool results.
    "tools": """{%- if tools is not none and tools %}
    {{- '<tools>\\nToday is ' + strftime_now('%d %B %Y') + '.\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}{{ '\\n' }}
        {{- tool.function.parameters | tojson(indent=2) }}
    {%- endfor %}
    {{- '</tools>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {{- '<assistant>' }}
        {%- for call in message.tool_calls %}
            {{- '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</call>' }}
        {%- endfor %}
        {{- '<end>\\n' }}
    {%- else %}
        {{- '<' + message.role + '>' + message.content + '<end>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}""",
    # The assistant's words are marked, with every kind of trimming.
    "marked": """{% for message in messages %}
    {%- if message.role == 'assistant' -%}
        <|a|>
        {%- generation -%}
        {{ message.content }}<|e|>
        {%- endgeneration %}

    {% else %}
<|{{ message.role[0] }}|>{{ message.content }}<|e|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}<|a|>{% endif %}""",
    # Python's own methods, values and tests.
    "python": """{%- macro shout(text) %}{{ text.upper() }}!{% endmacro -%}
{%- for message in messages %}
    {%- if message.content is none or message.content is undefined %}{% continue %}{% endif %}
    {%- set words = message['content'].split(' ') %}
    {{- loop.index }} {{ words | length }} {{ words[-1] }} {{ words | first | title }} {{ message.get('name', 'nobody') }}
    {%- for key, value in message.items() if key != 'content' %} {{ key }}={{ value }}{% endfor %}
    {{- ' ' ~ message.content.startswith('W') }} {{ none }} {{ message.content[:3] }} {{ message.content.replace('a', 'o') }}
    {%- if message.content is string and 'two' in message.content %} {{ shout('two') }}{% endif %}
    {{- ' ' + (messages | selectattr('role', 'equalto', 'user') | list | length | string) }}
    {%- if loop.index > 4 %}{% break %}{% endif %}
    {{- '\\n' }}
{%- endfor %}""",
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What the weather is & \"will\" be <here>",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}, "scale": {"enum": ["°C", "°F", None]}},
            "required": [],
        },
    },
}

CONVERSATIONS = {
    "one turn": {"messages": [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "2 + 3 = 5."}]},
    "three turns": {
        "messages": [
            {"role": "system", "content": "You are a patient teacher."},
            {"role": "user", "content": "Why is the sky blue?"},
            {"role": "assistant", "content": "Air scatters blue light more than red light."},
            {"role": "user", "content": "And in the evening?"},
            {"role": "assistant", "content": "The light's way is longer,\nso the red is left."},
            {"role": "user", "content": "Say it in two words."},
            {"role": "assistant", "content": "Longer way."},
        ]
    },
    "odd characters": {
        "messages": [
            {"role": "user", "content": "  Grüße — 你好 🙂\t\n"},
            {"role": "assistant", "content": " <b>\"it's\" 100 %</b> \\ {{ x }}  "},
        ]
    },
    "ends with the user": {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye"},
        ]
    },
    "two users": {"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hello?"}]},
    "a tool": {
        "messages": [
            {"role": "user", "content": "Will it rain in Ulm?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm", "days": 2, "exact": True, "share": 0.5, "small": 1e-7}}}],
            },
            {"role": "tool", "content": "{\"rain\": true}"},
            {"role": "assistant", "content": "Yes, take an umbrella."},
        ],
        "tools": [WEATHER],
    },
}


class Now(datetime.datetime):
    """Templates are told one date, today and tomorrow."""

    @classmethod
    def now(cls, tz=None):
        return DATE


def render(template, conversation, add_generation_prompt):
    rendered, ranges = chat_template_utils.render_jinja_template(
        [conversation["messages"]],
        tools=conversation.get("tools"),
        chat_template=template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=add_generation_prompt,
        **SPECIAL,
    )
    return rendered[0], ranges[0]


def texts(templates):
    chat_template_utils.datetime = Now
    cases = []
    for template_name, template in templates.items():
        for name, conversation in CONVERSATIONS.items():
            for prompt in (False, True):
                case = {"template": template_name, "conversation": name, "add_generation_prompt": prompt}
                try:
                    text, ranges = render(template, conversation, prompt)
                    case["text"] = text
                    if "endgeneration" in template:
                        case["generated"] = [text[start:end] for start, end in ranges]
                except Exception as error:
                    case["refused"] = type(error).__name__
                cases.append(case)
    return {"special_tokens": SPECIAL, "date": str(DATE.date()), "templates": templates, "conversations": CONVERSATIONS, "cases": cases}


def of_teacher(path):
    """Token ids, and for each whether the assistant says it: what is new when its turn is added, token by token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    newline = tokenizer.encode("\n", add_special_tokens=False)
    cases = []
    for name, conversation in CONVERSATIONS.items():
        messages = conversation["messages"]
        if any(message["content"] is None for message in messages):
            continue
        ids = tokenizer.apply_chat_template(messages)
        mask = [0] * len(ids)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: index + 1])
            assert ids[: len(before)] == before and ids[: len(after)] == after
            end = len(after) - (len(newline) if after[-len(newline) :] == newline else 0)
            for position in range(len(before), end):
                mask[position] = 1
        cases.append({"messages": messages, "input_ids": ids, "loss_mask": mask})
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=pathlib.Path)
    parser.add_argument("--templates", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.templates:
        templates = {str(path.relative_to(arguments.templates)): path.read_text() for path in sorted(arguments.templates.rglob("*.jinja"))}
        arguments.out.write_text(json.dumps(texts(templates), ensure_ascii=False))
        return
    (HERE / "chat.json").write_text(json.dumps(texts(TEMPLATES), indent=1, ensure_ascii=False) + "\n")
    if arguments.teacher:
        cases = of_teacher(arguments.teacher)
        (HERE / "chat_teacher.json").write_text(json.dumps(cases, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
