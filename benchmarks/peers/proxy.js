// What our credential proxy is measured against: a plain Node one that behaves as
// NanoClaw's does. It holds a request until it is whole, exchanges the key, and pipes
// the response.
//
//     node proxy.js UPSTREAM_PORT
//
// listens on a port of its own and prints it.

const http = require('node:http');

const upstreamPort = Number(process.argv[2]);
const HOP_BY_HOP = ['connection', 'keep-alive', 'transfer-encoding'];

const server = http.createServer((request, response) => {
  const pieces = [];
  request.on('data', (piece) => pieces.push(piece));
  request.on('end', () => {
    const body = Buffer.concat(pieces);
    const headers = { ...request.headers };
    for (const name of HOP_BY_HOP) delete headers[name];
    headers.host = `127.0.0.1:${upstreamPort}`;
    headers['content-length'] = body.length;
    headers['x-api-key'] = 'the-real-key';
    const upstream = http.request(
      {
        host: '127.0.0.1',
        port: upstreamPort,
        method: request.method,
        path: request.url,
        headers,
      },
      (answer) => {
        response.writeHead(answer.statusCode, answer.headers);
        answer.pipe(response);
      },
    );
    upstream.on('error', () => {
      if (!response.headersSent) response.writeHead(502);
      response.end();
    });
    upstream.end(body);
  });
});

server.listen(0, '127.0.0.1', () => console.log(server.address().port, 'token'));
