// Stands for libnvinfer, libnvonnxparser and libnvinfer_plugin while TensorRT's own Python package runs on a machine
// that has neither: just what its module is linked against. The registry takes whatever it is given.

struct Registry {
    // More slots than IPluginRegistry has; each answers 0, false or null.
    virtual long a0() { return 0; } virtual long a1() { return 0; } virtual long a2() { return 0; }
    virtual long a3() { return 0; } virtual long a4() { return 0; } virtual long a5() { return 0; }
    virtual long a6() { return 0; } virtual long a7() { return 0; } virtual long a8() { return 0; }
    virtual long a9() { return 0; } virtual long b0() { return 0; } virtual long b1() { return 0; }
    virtual long b2() { return 0; } virtual long b3() { return 0; } virtual long b4() { return 0; }
    virtual long b5() { return 0; } virtual long b6() { return 0; } virtual long b7() { return 0; }
    virtual long b8() { return 0; } virtual long b9() { return 0; } virtual long c0() { return 0; }
    virtual long c1() { return 0; } virtual long c2() { return 0; } virtual long c3() { return 0; }
    virtual long c4() { return 0; } virtual long c5() { return 0; } virtual long c6() { return 0; }
    virtual long c7() { return 0; } virtual long c8() { return 0; } virtual long c9() { return 0; }
};

static Registry registry;

extern "C" {
void* getPluginRegistry() { return &registry; }
void* getBuilderPluginRegistry() { return &registry; }
void* createInferBuilder_INTERNAL() { return nullptr; }
void* createInferRefitter_INTERNAL() { return nullptr; }
void* createInferRuntime_INTERNAL() { return nullptr; }
void* createNvOnnxParser_INTERNAL() { return nullptr; }
void* createNvOnnxParserRefitter_INTERNAL() { return nullptr; }
bool initLibNvInferPlugins() { return true; }
int getNvOnnxParserVersion() { return 0; }
}
