// A client that a Node application would write: the proto file, loaded as it is, and one request. Run beside
// node_modules as `node client.js HOST:PORT oip.proto`; prints the sums, the name and what an error says.
"use strict";
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [address, proto] = process.argv.slice(2);
const { inference } = grpc.loadPackageDefinition(loader.loadSync(proto, { keepCase: true, longs: Number }));
const client = new inference.GRPCInferenceService(address, grpc.credentials.createInsecure());
const call = (method, message) =>
  new Promise((done, failed) => client[method](message, (error, answer) => (error ? failed(error) : done(answer))));

async function main() {
  const input = (name, from) => ({
    name,
    datatype: "INT32",
    shape: [1, 16],
    contents: { int_contents: Array.from({ length: 16 }, (_, i) => from + i) },
  });
  const request = { model_name: "simple", id: "from-node", inputs: [input("INPUT0", 0), input("INPUT1", 100)] };
  const answer = await call("ModelInfer", request);
  const raw = answer.raw_output_contents[0];
  const sums = Array.from({ length: 16 }, (_, i) => raw.readInt32LE(4 * i));
  const refusal = await call("ModelInfer", { ...request, model_name: "no-such-model" }).catch((error) => error);
  const stream = client.ModelStreamInfer();
  const streamed = new Promise((done, failed) => stream.on("data", done).on("error", failed));
  stream.write(request);
  const { infer_response } = await streamed;
  stream.end();
  console.log(JSON.stringify({
    live: (await call("ServerLive", {})).live,
    id: answer.id,
    sums,
    code: refusal.code,
    details: refusal.details,
    streamed: infer_response.id,
  }));
  client.close();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
