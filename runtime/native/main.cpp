#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <system_error>
#include <thread>

#include "error.h"
#include "protocol.h"

namespace {

int fail(int code, const std::string& error, const std::string& hint) {
    const std::string line = nlohmann::json{{"error", error}, {"hint", hint}}.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    std::fprintf(edgespec::events(), "%s\n", line.c_str());
    std::fflush(edgespec::events());
    std::fprintf(stderr, "error: %s\nhint:  %s\n", error.c_str(), hint.c_str());
    return code;
}

edgespec::Options parse(int argc, char** argv) {
    edgespec::Options out;
    out.backend.threads = std::clamp(int(std::thread::hardware_concurrency()), 1, 4);
    edgespec::QnnOptions& qnn = out.backend.qnn;
    const std::map<std::string, std::string*> texts{{"--bundle", &out.bundle}, {"--table", &out.table}, {"--qnn", &qnn.folder}, {"--compiled", &qnn.compiled}};
    const std::map<std::string, std::pair<int, int*>> numbers{
        {"--threads", {256, &out.backend.threads}}, {"--htp-arch", {1000, &qnn.htp_arch}}, {"--soc-model", {100'000, &qnn.soc_model}}};
    for (int i = 1; i < argc; ++i) {
        const std::string flag = argv[i];
        if (flag == "--no-prepack") {
            out.backend.prepack = false;
            continue;
        }
        const auto text = texts.find(flag);
        const auto number = numbers.find(flag);
        if (text == texts.end() && number == numbers.end()) throw edgespec::Error("unknown flag " + flag, "see edgespec-runtime --help");
        if (++i == argc) throw edgespec::Error(flag + " needs a value", "see edgespec-runtime --help");
        if (text != texts.end()) {
            *text->second = argv[i];
            continue;
        }
        const auto [most, place] = number->second;
        const auto [end, fault] = std::from_chars(argv[i], argv[i] + std::strlen(argv[i]), *place);
        if (fault != std::errc() || *end || *place < 1 || *place > most) throw edgespec::Error(flag + " must be 1 to " + std::to_string(most), "see edgespec-runtime --help");
    }
    if (out.bundle.empty()) throw edgespec::Error("no bundle is named", "edgespec-runtime --bundle DIR");
    if (!qnn.folder.empty() && !(qnn.htp_arch && qnn.soc_model)) throw edgespec::Error("--qnn needs --htp-arch and --soc-model", "for an 8 Elite: --htp-arch 79 --soc-model 69");
    if (qnn.folder.empty() && !qnn.compiled.empty()) throw edgespec::Error("--compiled needs --qnn", "name the folder of Qualcomm's provider");
    return out;
}

// A standard stream that was never open would be the next file that is opened.
void occupy_streams() {
    int file;
    while ((file = ::open("/dev/null", O_RDONLY)) >= 0 && file <= STDERR_FILENO) {}
    if (file > STDERR_FILENO) ::close(file);
}

}  // namespace

int main(int argc, char** argv) {
    occupy_streams();
    std::signal(SIGPIPE, SIG_IGN);
    std::signal(SIGXFSZ, SIG_IGN);  // a snapshot that is too large is an error
    for (int i = 1; i < argc; ++i) {
        if (!std::strcmp(argv[i], "--help") || !std::strcmp(argv[i], "-h")) return std::fputs(edgespec::HELP, stdout), 0;
        if (!std::strcmp(argv[i], "--version")) return std::puts(EDGESPEC_VERSION), 0;
    }
    edgespec::events();
    try {
        return edgespec::serve(parse(argc, argv));
    } catch (const edgespec::Error& e) {
        return fail(2, e.message, e.hint);
    } catch (const std::bad_alloc&) {
        return fail(2, "not enough memory to open the bundle", "close other programs, or use --no-prepack");
    } catch (const std::exception& e) {
        const auto* refusal = dynamic_cast<const std::system_error*>(&e);
        if (refusal && refusal->code() == std::errc::resource_unavailable_try_again) return fail(2, "the machine refuses a thread", "close other programs");
        return fail(101, std::string("a bug of edgespec-runtime: ") + e.what(), "report it with the bundle's manifest.json");
    }
}
