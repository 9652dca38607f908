"""Chat templates with tools, written here in the style of those that checkpoints have, and a
conversation with tools."""

from __future__ import annotations

# Llama 3.1's style: tools in the user's first message, one call a turn, its arguments as
# "parameters", results as JSON under the role ipython.
LLAMA31 = r"""
{{- bos_token }}
{%- set first = 0 %}
{%- set instructions = '' %}
{%- if messages[0].role == 'system' %}
    {%- set instructions = messages[0].content | trim %}
    {%- set first = 1 %}
{%- endif %}
{{- '<|im_start|>system\n\n' }}
{%- if tools %}{{- 'Environment: ipython\n' }}{% endif %}
{{- 'Cutting Knowledge Date: December 2023\n\n' + instructions + '<|im_end|>' }}
{%- for message in messages[first:] %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n\n' }}
        {%- if loop.first and tools %}
            {{- 'Answer with a JSON for a function call, in the format {"name": function name, ' }}
            {{- '"parameters": dictionary of argument name and its value}.\n\n' }}
            {%- for tool in tools %}
                {{- tool | tojson(indent=4) + '\n\n' }}
            {%- endfor %}
        {%- endif %}
        {{- message.content | trim + '<|im_end|>' }}
    {%- elif message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|im_start|>assistant\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}<|im_end|>' }}
    {%- elif message.role in ('tool', 'ipython') %}
        {{- '<|im_start|>ipython\n\n' }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- '<|im_end|>' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n\n' + message.content | trim + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{% endif %}
"""

# Hermes' style: tools in the system message, calls and results in tags, results of one turn joined.
HERMES = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{% endif %}
    {{- '# Tools\n\nYou may call one or more functions.\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + tool | tojson }}{% endfor %}
    {{- '\n</tools>\n\nFor each call return a JSON object within <tool_call></tool_call> tags.' }}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\n' + message.content }}{% endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""

# Qwen3's style: as Hermes', and answers behind the user's last message keep their thoughts; the
# last answer gets an empty one where it has none.
THINKING = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{% endif %}
    {{- '# Tools\n\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + tool | tojson }}{% endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set last = namespace(question=0) %}
{%- for message in messages if message.role == 'user' %}
    {%- set last.question = messages.index(message) %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set parts = message.content.split('</think>') %}
        {%- set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}
        {%- set text = parts[-1].lstrip('\n') %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > last.question and (loop.last or thought) %}
            {{- '<think>\n' + thought + '\n</think>\n\n' }}
        {%- endif %}
        {{- text }}
        {%- for call in message.tool_calls or [] %}
            {%- if text or not loop.first %}{{- '\n' }}{% endif %}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""

# Calls in tags, as Qwen3-Coder has them; no thoughts, and results as the user's text.
TAGS = r"""
{%- for message in messages %}
    {{- '<|im_start|>' + (message.role if message.role != 'tool' else 'user') + '\n' }}
    {%- if loop.first %}
        {%- for tool in tools or [] %}{{- tool.function | tojson + '\n' }}{% endfor %}
    {%- endif %}
    {{- message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>\n<function=' + call.function.name + '>\n' }}
        {%- for name, value in call.function.arguments | items %}
            {%- if value is mapping or (value is sequence and value is not string) %}
                {%- set value = value | tojson %}
            {%- endif %}
            {{- '<parameter=' + name + '>\n' + value | string + '\n</parameter>\n' }}
        {%- endfor %}
        {{- '</function>\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""
TEMPLATES = {"llama31": LLAMA31, "hermes": HERMES, "thinking": THINKING, "tags": TAGS}


def tool(name: str, parameter: str) -> dict:
    """The definition of a tool with one parameter."""
    properties = {parameter: {"type": "string", "description": f"The {parameter}, as text."}}
    parameters = {"type": "object", "properties": properties, "required": [parameter]}
    function = {
        "name": name,
        "description": f"Tells about a {parameter}.",
        "parameters": parameters,
    }
    return {"type": "function", "function": function}


def call(name: str, **arguments: object) -> dict:
    """A call of a tool."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: dict, content: str = "") -> dict:
    """The assistant's message that makes calls."""
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(text: str) -> dict:
    """The message of a tool."""
    return {"role": "tool", "content": text}


WEATHER = tool("get_weather", "city")
TOOLS = [WEATHER, tool("get_time", "zone")]
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the weather in Orléans?"},
    calling(call("get_weather", city="Orléans", days=2, exact=True)),
    result('{"celsius": 18.5}'),
    {"role": "assistant", "content": "It is 18.5 degrees."},
    {"role": "user", "content": "And the time?"},
    calling(call("get_time", zone="Europe/Paris")),
    result("12:30"),
    {"role": "assistant", "content": "Half past twelve."},
]
