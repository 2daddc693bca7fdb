// Files that nobody vouches for: graph files cut and changed at every byte, manifests, tables, snapshots.
#include <unistd.h>

#include <fstream>
#include <string>

#include "base64.h"
#include "costs.h"
#include "json.h"
#include "manifest.h"
#include "onnx_table.h"
#include "sampling.h"
#include "testing.h"

using namespace edgespec;

static std::string folder;

static void write(const std::string& name, const std::string& text) { std::ofstream(folder + "/" + name, std::ios::binary) << text; }

// A protobuf field of bytes, and one of a number.
static std::string bytes(int number, const std::string& text) { return std::string{char(number << 3 | 2), char(text.size())} + text; }
static std::string number(int field, int value) { return std::string{char(field << 3), char(value)}; }

static std::string entry(const std::string& key, const std::string& value) { return bytes(13, bytes(1, key) + bytes(2, value)); }

static void tables() {
    const std::string tensor = number(1, 3) + number(1, 4) + number(2, 1) + bytes(8, "w") + entry("location", "x.data") + entry("offset", "64") + entry("length", "48") + number(14, 1);
    const std::string inside = number(1, 1) + number(2, 1) + bytes(8, "c") + bytes(9, "abcd");
    const std::string model = number(1, 10) + bytes(7, bytes(2, "name") + bytes(5, tensor) + bytes(5, inside));
    const auto read = [](const std::string& m) { return external_arrays(reinterpret_cast<const uint8_t*>(m.data()), m.size()); };
    const auto found = read(model);
    CHECK(found.size() == 1 && found[0].name == "w" && found[0].file == "x.data" && found[0].type == 1);
    CHECK(found[0].offset == 64 && found[0].bytes == 48 && (found[0].shape == std::vector<int64_t>{3, 4}));
    for (size_t cut = 0; cut < model.size(); ++cut) {  // nothing outside is read (AddressSanitizer sees it)
        const std::string part(model.substr(0, cut));
        (void)error_of([&] { read(part); });
    }
    Random random(1);
    for (int i = 0; i < 20000; ++i) {
        std::string spoilt = model;
        for (int k = 0; k < 3; ++k) spoilt[size_t(random.uniform() * double(spoilt.size()))] = char(random.uniform() * 256);
        (void)error_of([&] { read(spoilt); });
    }
    CHECK(error_of([&] { read(number(1, 10) + bytes(7, bytes(5, entry("offset", "-1")))); }) != "");
}

static std::string manifest(const std::string& files, const std::string& models) {
    return R"({"schema":8,"device":"cpu","format":"onnx","tokenizer":{"stop_ids":[2]},"vision":[],"files":{)" + files + R"(},"models":[)" + models + "]}";
}

static void manifests() {
    const auto refused = [](const std::string& text) {
        write("manifest.json", text);
        return error_of([] { read_manifest(folder); });
    };
    CHECK(refused("") == "manifest.json is no JSON object" && refused("[1") != "" && refused("{}") != "");
    CHECK(refused(R"({"schema":99})") == "the bundle has schema 99, this runtime reads 8");
    CHECK(refused(R"({"schema":1e99})") != "" && refused(R"({"schema":-1})") != "" && refused(R"({"schema":18446744073709551615})") != "");
    CHECK(refused(manifest(R"("../x":{"bytes":1})", "")) == "manifest.files names an unsafe path");
    CHECK(refused(manifest(R"("/etc/passwd":{"bytes":1})", "")) == "manifest.files names an unsafe path");
    CHECK(refused(manifest(R"("a/../../x":{"bytes":1})", "")) == "manifest.files names an unsafe path");
    CHECK(refused(manifest(R"("none.onnx":{"bytes":1})", "")) == "none.onnx is missing from the bundle");
    write("x.onnx", "12345");
    CHECK(refused(manifest(R"("x.onnx":{"bytes":4})", "")) == "x.onnx has 5 bytes, not 4");
    CHECK(symlink("/etc/hostname", (folder + "/link.onnx").c_str()) == 0);
    CHECK(refused(manifest(R"("link.onnx":{"bytes":4})", "")) == "link.onnx is not a regular file");
    CHECK(refused(manifest("", "")) == "the bundle has no target model");
    CHECK(refused(manifest("", "{}")) != "" && refused(manifest("", "7")) != "");
    CHECK(error_of([] { read_manifest(folder + "/nowhere"); }) != "");
    const auto nested = [](size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); };
    CHECK(parse_json(nested(60)).is_array() && parse_json(nested(70)).is_discarded());
    for (const std::string& deep : {std::string(100000, '['), nested(1000000)}) {  // ends in an error, not in the stack
        CHECK(refused(deep) == "manifest.json is no JSON object");
        CHECK(refused(R"({"schema":8,"device":"cpu","format":"onnx","files":)" + deep + "}") == "manifest.json is no JSON object");
    }
}

static void cost_tables() {
    Manifest bundle;
    bundle.device = "cpu";
    ModelEntry target;
    target.name = "target", target.widths_agree = true, target.bytes_weights = 100;
    for (const auto& [kind, width] : std::vector<std::pair<const char*, int>>{{"decode", 1}, {"verify", 2}, {"verify", 4}})
        target.graphs.push_back({"", kind, width, 1, {}, {}});
    bundle.models.push_back(target);
    CHECK(default_costs(bundle).verify.size() == 3);
    const auto refused = [&](const std::string& text) {
        write("t.json", text);
        return error_of([&] { read_costs(folder + "/t.json", bundle); });
    };
    CHECK(refused(R"({"verify":{"1":10.5,"2":11,"4":12}})") == "");
    CHECK(read_costs(folder + "/t.json", bundle).verify.at(1) == 10.5);
    CHECK(refused(R"({"verify":{"1":1,"2":1,"4":1},"acceptance":0.25})") == "" && read_costs(folder + "/t.json", bundle).acceptance == 0.25);
    CHECK(refused(R"({"verify":{"1":1,"2":1,"4":1},"acceptance":1.5})") != "");
    CHECK(refused(R"({"verify":{"1":10,"2":11}})") == folder + "/t.json lacks the cost of width 4");
    CHECK(refused(R"({"verify":{"1":10,"2":0,"4":1}})") != "" && refused(R"({"verify":{"1":10,"2":"x","4":1}})") != "" && refused("[]") != "" && refused("") != "");
    CHECK(refused(R"({"verify":{"4":12},"widths_agree":false})") == "" && read_costs(folder + "/t.json", bundle).width_for(1) == 4);
    CHECK(refused(R"({"verify":{"1":1,"2":1,"4":1},"widths_agree":1})") != "");
    CHECK(refused(R"({"verify":{"1":1,"2":1,"4":1},"widths_agree":)" + std::string(3000000, '[') + std::string(3000000, ']') + "}") != "");
    CHECK(refused(std::string(2 << 20, ' ')) == folder + "/t.json is absurdly large");
    CHECK(error_of([&] { read_costs(folder, bundle); }) == folder + " cannot be read");  // a folder; a pipe would hang
    bundle.models[0].widths_agree = false;  // then every call has the widest width
    CHECK(default_costs(bundle).verify.size() == 1 && default_costs(bundle).width_for(1) == 4);
}

static void numbers_in_text() {
    std::vector<float> out;
    CHECK(from_base64("AACAPwAAAMA=", out) && (out == std::vector<float>{1.0f, -2.0f}));
    CHECK(from_base64("AACAPwAAAMAAAEBA", out) && (out == std::vector<float>{1.0f, -2.0f, 3.0f}));
    for (const char* wrong : {"", "A", "AACAPw", "AACAPw=", "AACA", "AACAPwA=", "AACA=wAA", "====", "AACAPw=A", "AAC Pw==", "AACAPw==AACAPw=="}) CHECK(!from_base64(wrong, out));
}

int main() {
    numbers_in_text();
    char name[] = "/tmp/edgespec-test-XXXXXX";
    CHECK(mkdtemp(name));
    folder = name;
    tables(), manifests(), cost_tables();
    for (const char* file : {"manifest.json", "x.onnx", "link.onnx", "t.json"}) unlink((folder + "/" + file).c_str());
    rmdir(name);
}
