// openai-node against a server: a stream with a tool call, one with its helper, an answer parsed by a schema.
//
// node tests/serve/openai_node.mjs URL FOLDER     FOLDER: where npm has installed openai and zod

import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import assert from "node:assert";

const [url, folder] = process.argv.slice(2);
const require = createRequire(join(folder, "package.json"));
const load = (name) => import(pathToFileURL(require.resolve(name)));
const { default: OpenAI } = await load("openai");
const { zodResponseFormat } = await load("openai/helpers/zod");
const { z } = await load("zod");

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "hello" }];
const parameters = { type: "object", properties: { city: { enum: ["Rome"] } }, required: ["city"], additionalProperties: false };
const asked = {
  model: "m",
  messages,
  max_tokens: 200,
  tools: [{ type: "function", function: { name: "weather", parameters, strict: true } }],
  tool_choice: "required",
  parallel_tool_calls: false,
};

// chunk by chunk: id, type and name in the first delta alone, one end, the usage last
let name = "", given = "", ends = 0, last;
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } })) {
  last = chunk;
  for (const choice of chunk.choices) {
    if (choice.finish_reason) { ends++; assert.equal(choice.finish_reason, "tool_calls"); }
    for (const call of choice.delta.tool_calls ?? []) {
      name += call.function.name ?? "";
      given += call.function.arguments ?? "";
    }
  }
}
assert.equal(name, "weather");
assert.deepEqual(JSON.parse(given), { city: "Rome" });
assert.equal(ends, 1);
assert.ok(last.usage.completion_tokens > 0);

// the helper, which throws at a changed call and at a missing end
const final = await client.chat.completions.stream(asked).finalChatCompletion();
assert.deepEqual(final.choices[0].message.tool_calls[0].function.parsed_arguments, { city: "Rome" });

// a text, streamed: what comes is what there is at the end
let said = "";
const stream = client.chat.completions.stream({ model: "m", messages, max_tokens: 50 });
stream.on("content", (delta) => { said += delta; });
assert.equal((await stream.finalChatCompletion()).choices[0].message.content, said);

// a schema
const Shape = z.object({ kind: z.enum(["a", "b"]), sure: z.boolean() });
const parsed = await client.chat.completions.parse({
  model: "m", messages, max_tokens: 200, response_format: zodResponseFormat(Shape, "shape"),
});
Shape.parse(parsed.choices[0].message.parsed);

// responses
const response = await client.responses.create({ model: "m", input: "hello", max_output_tokens: 50 });
assert.equal(response.object, "response");
const events = [];
for await (const event of client.responses.stream({ model: "m", input: "hello", max_output_tokens: 50 })) events.push(event.type);
assert.equal(events[0], "response.created");
assert.match(events.at(-1), /^response\.(completed|incomplete)$/);

// errors keep their class, and a stream that is left behind closes
await assert.rejects(client.chat.completions.create({ model: "m", messages: [] }), OpenAI.BadRequestError);
const left = await client.chat.completions.create({ model: "m", messages, max_tokens: 1000, stream: true, logit_bias: {} });
left.controller.abort();
console.log("ok   tool calls, helper, text, schema, responses, errors");
