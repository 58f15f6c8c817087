// What our parser is measured against: NanoClaw's way to read an agent's stdout. Each
// read becomes text on its own and is added to what is left; the markers are searched
// from its beginning; what was used up is cut off. Logging, the copy of stdout that it
// keeps, and callbacks are left out, in its favour.
//
// Orders come by stdin, an object a line: the file to read, the size of the reads in
// bytes, and the seconds after which to give up. For each, a line says how long it took
// and how many frames there were.

const { readFileSync } = require('node:fs');
const { createInterface } = require('node:readline');

const START = '---NANOCLAW_OUTPUT_START---';
const END = '---NANOCLAW_OUTPUT_END---';

function cut(data, size) {
  const reads = [];
  for (let at = 0; at < data.length; at += size) {
    reads.push(data.subarray(at, at + size));
  }
  return reads;
}

function parse(reads, limit) {
  const deadline = performance.now() + limit * 1000;
  let text = '';
  let frames = 0;
  for (const [number, read] of reads.entries()) {
    if (number % 64 === 0 && performance.now() > deadline) break;
    text += read.toString();
    let start;
    while ((start = text.indexOf(START)) !== -1) {
      const end = text.indexOf(END, start);
      if (end === -1) break;
      const body = text.slice(start + START.length, end).trim();
      text = text.slice(end + END.length);
      frames += 1;
      try {
        JSON.parse(body);
      } catch (error) {
        if (!(error instanceof SyntaxError)) throw error;
      }
    }
  }
  return frames;
}

createInterface({ input: process.stdin }).on('line', (line) => {
  const { file, read, limit } = JSON.parse(line);
  const reads = cut(readFileSync(file), read);
  const started = performance.now();
  const frames = parse(reads, limit);
  const seconds = (performance.now() - started) / 1000;
  console.log(JSON.stringify({ seconds, frames }));
});
