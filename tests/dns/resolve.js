// Asks for names by both of Node's resolvers, the C library's (lookup) and its own (resolve), and prints the addresses; for
// the last name its text, by its own.
const { lookup, resolve4, resolve6, resolveTxt } = require("dns").promises;

async function main() {
  const names = process.argv.slice(2);
  const last = names.pop();
  for (const name of names) {
    const found = (await lookup(name, { all: true })).map((one) => one.address).sort();
    const own = [...(await resolve4(name)), ...(await resolve6(name))].sort();
    if (found.join() !== own.join()) throw new Error(`lookup: ${found}, resolve: ${own}`);
    found.forEach((address) => console.log(address));
  }
  console.log("text", (await resolveTxt(last)).flat().join("").length);
}

main().catch((error) => {
  console.log(error);
  process.exit(1);
});
