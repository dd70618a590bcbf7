// The server's OpenAI API, as far as the page needs it.

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function refused(response) {
  try {
    return new Error((await response.json()).error.message);
  } catch {
    return new Error(`HTTP ${response.status}`);
  }
}

export async function models(key) {
  const response = await fetch("/v1/models", { headers: headers(key) });
  if (!response.ok) throw await refused(response);
  return (await response.json()).data;
}

/** How many tokens a conversation takes as a prompt. */
export async function promptTokens(body, key) {
  const response = await fetch("/apply-template", { method: "POST", headers: headers(key), body: JSON.stringify(body) });
  if (!response.ok) throw await refused(response);
  return (await response.json()).tokens.length;
}

/** Stream an answer; yields {text, tokens, usage, finish} pieces. */
export async function* stream(body, key, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST", headers: headers(key), signal,
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  if (!response.ok) throw await refused(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split(/\r?\n\r?\n/);
    held = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (!data || data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0];
      yield { text: choice?.delta?.content ?? "", tokens: choice?.logprobs?.content ?? [], usage: chunk.usage, finish: choice?.finish_reason };
    }
  }
}
