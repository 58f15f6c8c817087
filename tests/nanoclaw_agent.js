// An agent that knows NanoClaw's protocol and nothing of clawtrio's: the input is all of
// stdin, an output is three lines, follow-ups are files that it polls for, and "_close"
// is one that ends it.
"use strict";

const fs = require("fs");
const path = require("path");

const INBOX = "/workspace/ipc/input";
const POLL_MS = 500;

function say(output) {
  console.log("---NANOCLAW_OUTPUT_START---");
  console.log(JSON.stringify(output));
  console.log("---NANOCLAW_OUTPUT_END---");
}

function answer(prompt, sessionId) {
  console.log(`noise: ${prompt.length} characters`);
  say({ status: "success", result: `You said: ${prompt}`, newSessionId: sessionId });
  // It has no other word for waiting.
  say({ status: "success", result: null, newSessionId: sessionId });
}

// All texts that wait, in the order of their names; null at the close.
function hear() {
  if (fs.existsSync(path.join(INBOX, "_close"))) {
    fs.unlinkSync(path.join(INBOX, "_close"));
    return null;
  }
  const names = fs.readdirSync(INBOX).filter((name) => name.endsWith(".json")).sort();
  return names.map((name) => {
    const file = path.join(INBOX, name);
    const message = JSON.parse(fs.readFileSync(file, "utf-8"));
    fs.unlinkSync(file);
    return message.text;
  });
}

function main() {
  const input = JSON.parse(fs.readFileSync(0, "utf-8"));
  const sessionId = input.sessionId || `nanoclaw-${process.pid}`;
  console.error(`[agent-runner] input for ${input.groupFolder}`);
  fs.mkdirSync(INBOX, { recursive: true });
  answer(input.prompt, sessionId);
  const timer = setInterval(() => {
    const texts = hear();
    if (texts === null) {
      clearInterval(timer);
    } else if (texts.length > 0) {
      answer(texts.join("\n"), sessionId);
    }
  }, POLL_MS);
}

main();
