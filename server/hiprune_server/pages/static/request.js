// What is asked of the server, and how the same is asked without this page.

export const body = (model, question, picture, plan) => ({
  model,
  max_tokens: 200,
  temperature: 0,
  messages: [{
    role: "user",
    content: [
      { type: "text", text: question },
      { type: "image_url", image_url: { url: picture } },
    ],
  }],
  hiprune: plan,
});

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

const MARK = "PICTURE-GOES-HERE";

// The picture is read from a file: its data would be longer than a terminal likes.
export function asCurl(url, model, question, file, type, plan, hasKey) {
  const text = JSON.stringify(body(model, question, MARK, plan));
  const [before, after] = text.split(MARK).map((part) => part.replaceAll("%", "%%"));
  const lines = [
    `PICTURE=${quoted(file)}`,
    `{ printf ${quoted(before.replaceAll("\\", "\\\\") + `data:${type};base64,`)}; base64 < "$PICTURE" | tr -d '\\n'; ` +
      `printf ${quoted(after.replaceAll("\\", "\\\\"))}; } |`,
    `curl -s ${quoted(url)} -H 'Content-Type: application/json' \\`,
  ];
  if (hasKey) lines.push(`  -H "Authorization: Bearer $API_KEY" \\`);
  lines.push("  --data-binary @-");
  return lines.join("\n");
}

export function asPython(base, model, question, file, type, plan, hasKey) {
  const py = (value) => JSON.stringify(value); // a JSON string is a Python string too
  return `import base64
${hasKey ? "import os\n" : ""}
from openai import OpenAI

client = OpenAI(base_url=${py(base)}, api_key=${hasKey ? 'os.environ["API_KEY"]' : '"none"'})
picture = base64.b64encode(open(${py(file)}, "rb").read()).decode()
answer = client.chat.completions.create(
    model=${py(model)},
    max_tokens=200,
    temperature=0,
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "text", "text": ${py(question)}},
                {"type": "image_url", "image_url": {"url": f"data:${type};base64,{picture}"}},
            ],
        }
    ],
    extra_body={"hiprune": ${JSON.stringify(plan)}},
)
print(answer.choices[0].message.content, answer.hiprune)
`;
}

// The events of a stream, parsed, as they come.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const text = part.replace(/^data: /, "");
      if (text && text !== "[DONE]") yield JSON.parse(text);
    }
  }
}

// What a refusal says, whichever envelope it comes in.
export async function refusal(response) {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    return `${response.status}: ${error.message ?? error}`;
  } catch {
    return `${response.status}: ${text.slice(0, 200)}`;
  }
}
