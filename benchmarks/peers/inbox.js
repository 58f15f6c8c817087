// How NanoClaw's agent gets its follow-ups: every 500 ms it lists the directory where
// they are files. It prints how many milliseconds each was there; "_close" ends it.
//
//     node inbox.js DIRECTORY

const fs = require('node:fs');
const path = require('node:path');

const POLL_MS = 500;
const directory = process.argv[2];

function look() {
  // All clocks of a machine that are monotonic count from the same moment.
  const now = Number(process.hrtime.bigint()) / 1e6;
  for (const name of fs.readdirSync(directory).sort()) {
    if (!name.endsWith('.json')) continue;
    const file = path.join(directory, name);
    const message = JSON.parse(fs.readFileSync(file, 'utf-8'));
    fs.unlinkSync(file);
    console.log(now - message.sent);
  }
  if (fs.existsSync(path.join(directory, '_close'))) return;
  setTimeout(look, POLL_MS);
}

look();
