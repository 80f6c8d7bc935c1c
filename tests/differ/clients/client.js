// The HTTP client in JavaScript of the comparison of languages: see client.c, which does the same.
"use strict";
const http = require("http");
const net = require("net");

const PORT = 7014;
const LIMIT = 20000;

function fetch(host, path, agent) {
  return new Promise((resolve, reject) => {
    const request = http.get({ host, port: PORT, path, agent, timeout: LIMIT }, (answer) => {
      const { remoteAddress, remotePort, localAddress } = request.socket;
      let body = "";
      answer.on("data", (part) => (body += part));
      answer.on("end", () => resolve({ body, reused: request.reusedSocket, remoteAddress, remotePort, localAddress }));
    });
    request.on("timeout", () => request.destroy(new Error("timeout")));
    request.on("error", reject);
  });
}

async function main() {
  for (const name of process.argv.slice(2)) {
    const got = await fetch(name, "/once", false);
    const chunked = await fetch(name, "/chunked", false);
    console.log(`${name} at ${got.remoteAddress}:${got.remotePort} from ${got.localAddress}: ${got.body}, ${chunked.body}`);
  }
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
  for (let number = 0; number < 5; number++) {
    const got = await fetch("far.test", `/kept/${number}`, agent);
    console.log(`kept: ${got.body}, reused: ${got.reused}`);
  }
  agent.destroy();
  const numbers = [...Array(100).keys()];
  const bodies = await Promise.all(numbers.map((number) => fetch("far.test", `/many/${number}`, false)));
  console.log(`many: ${bodies.filter((got, number) => got.body === `you asked for /many/${number}`).length}`);
  // A half-open connection, as net.Server and its clients have it.
  const echoed = await new Promise((resolve, reject) => {
    const socket = net.connect({ host: "far.test", port: 7001, allowHalfOpen: true }, () => socket.end("half"));
    let text = "";
    socket.on("data", (part) => (text += part));
    socket.on("end", () => resolve(text));
    socket.on("error", reject);
  });
  console.log(`echo: ${echoed}`);
  await fetch("nowhere.test", "/", false).catch((error) => console.log(`unknown name: ${error.code}`));
}

main().catch((error) => {
  console.log(`failed: ${error}`);
  process.exit(1);
});
